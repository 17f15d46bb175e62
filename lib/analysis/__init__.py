"""What a dictionary is worth: reconstruction, loss, known concepts, planted features.

The parts are `metrics`, `truth` and `recovery`.
"""
