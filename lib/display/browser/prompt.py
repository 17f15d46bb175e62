"""A prompt box: a model's answer with one latent changed, beside the unchanged one."""

from html import escape

import ipywidgets as widgets
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.display.browser.cards import shaded
from lib.display.tokens import readable_tokens
from lib.latents.source import Edit, LatentSource
from lib.latents.steering import clamp, scale
from lib.models.generate import answer, prompt_ids

MAX_NEW_TOKENS = 64
NOTE = (
    "<i>scale</i>: its values times the factor; 1 changes nothing, 0 ablates. "
    "<i>add</i>: the factor times its typical value, at every token."
)


class PromptBox:
    """Greedy answers of a source's model, unchanged and with one latent scaled or clamped.

    The button asks for both; moving the slider or changing the mode asks for the changed one.
    """

    def __init__(
        self,
        source: LatentSource,
        tokenizer: PreTrainedTokenizerBase,
        typical: Float[Tensor, " n_latents"],
    ) -> None:
        """
        Args:
            typical: the unit of mode `add`, for each latent.
        """
        self.source, self.tokenizer, self.typical = source, tokenizer, typical
        self.latent = 0
        self._unchanged: tuple[str, str] | None = None
        self.prompt = widgets.Textarea(
            placeholder="a prompt for the model", layout={"width": "99%", "height": "64px"}
        )
        self.factor = widgets.FloatSlider(
            value=1.0, min=-5.0, max=10.0, step=0.5, description="factor", continuous_update=False,
            layout={"flex": "0 0 380px"},
        )  # fmt: skip
        self.mode = widgets.RadioButtons(options=["scale", "add"], layout={"flex": "0 0 90px"})
        self.button = widgets.Button(description="Run", layout={"flex": "0 0 80px"})
        self.answer = widgets.HTML()
        for part, name in (
            (self.prompt, "prompt"), (self.factor, "slider"), (self.mode, "mode"),
            (self.button, "run"), (self.answer, "answer"),
        ):  # fmt: skip
            part.add_class(f"fb-{name}")
        controls = widgets.HBox([self.factor, self.mode, self.button, widgets.HTML(NOTE)])
        heading = widgets.HTML("<h4>Run the model with this latent changed</h4>")
        self.widget = widgets.VBox([heading, self.prompt, controls, self.answer])
        self.button.on_click(lambda _: self._react(afresh=True))
        for part in (self.factor, self.mode):
            part.observe(lambda _: self._react(), names="value")

    def select(self, latent: int) -> None:
        """Turn to another latent; its answer comes when it is asked for."""
        self.latent = latent
        self.answer.value = ""

    def edit(self) -> Edit:
        """What the slider and the mode say."""
        if self.mode.value == "scale":
            return scale(self.factor.value)
        return clamp(self.factor.value * float(self.typical[self.latent]))

    def answers(self, prompt: str) -> tuple[str, str]:
        """Unchanged, and with the latent changed."""
        if self._unchanged is None or self._unchanged[0] != prompt:
            with self.source.edited({}):
                self._unchanged = prompt, self._answer(prompt)
        with self.source.edited({self.latent: self.edit()}):
            changed = self._answer(prompt)
        return self._unchanged[1], changed

    def _react(self, afresh: bool = False) -> None:
        """Show both answers; errors too, which a widget would hide."""
        prompt = self.prompt.value.strip()
        if not prompt:
            return
        if afresh:
            self._unchanged = None
        self.answer.value = "<p>running …</p>"
        try:
            self.answer.value = self._shown(prompt, *self.answers(prompt))
        except (ValueError, RuntimeError) as error:
            self.answer.value = f"<p class='fb-error'>{escape(str(error))}</p>"

    def _shown(self, prompt: str, unchanged: str, changed: str) -> str:
        ids, values = self._on_prompt(prompt)
        texts = readable_tokens(self.tokenizer, ids)
        top = max(map(abs, values), default=0.0)
        note = "" if top else "It is silent on this prompt: only <i>add</i> can move it there."
        what = "×" if self.mode.value == "scale" else "added ×"
        answers = "".join(
            f"<div class='fb-panel'><h4>{name}</h4><p dir='auto'>{escape(text) or '∅'}</p></div>"
            for name, text in (
                ("unchanged", unchanged),
                (f"latent {self.latent} {what} {self.factor.value:g}", changed),
            )
        )
        return (
            f"<div class='fb-panels'>{answers}</div><h4>Latent {self.latent} on the prompt</h4>"
            f"<p class='fb-text'>{shaded(texts, values, top or 1.0)}</p><p>{note}</p>"
        )

    def _answer(self, prompt: str) -> str:
        model = self.source.model
        return answer(model, self.tokenizer, [prompt], max_new_tokens=MAX_NEW_TOKENS)[0]

    def _on_prompt(self, prompt: str) -> tuple[list[int], list[float]]:
        """The prompt's tokens and the latent's values there."""
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)])
        acts = self.source.latents(ids, torch.ones_like(ids, dtype=torch.bool))
        own = acts.indices == self.latent
        values = torch.zeros(ids.shape[1])
        values[acts.rows[own].cpu()] = acts.values[own].float().cpu()
        return ids[0].tolist(), values.tolist()
