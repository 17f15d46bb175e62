"""The pictures of README.md: `make figures` (needs Chrome or Chromium)."""

from lib import paths
from lib.display import losses_by_token
from lib.models import load_model
from lib.models.tiny import pad_batch, token_losses
from lib.world import Reader, World


def main() -> None:
    world = World()
    model, tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-gemma2", device="cpu")
    exchange = next(
        x for x in world.stream("test", seed=0) if x.intent == "gain" and x.style == "plain"
    )
    tokens, mask = pad_batch([exchange], tokenizer.get_vocab(), tokenizer.pad_token_id)
    nats = token_losses(model, tokens, mask)[0][0].tolist()
    figure = losses_by_token(exchange.tokens[1:], nats, Reader(world).surprisal(exchange)[1:])
    figure.write_image(paths.figures_dir() / "00_floor.png", width=1000, height=380, scale=2)


if __name__ == "__main__":
    main()
