"""Sets of prompts, always the same ones: those of a default audit, and others cut out of texts that are unlike."""

from __future__ import annotations

import numpy as np

from kvdrift.capture.prompts import Encode, default_prompts

DEFAULT_SET = "set_0"
_PROMPTS_A_SET = 3
_SHORTEST, _LONGEST = 5, 40

# Unlike texts, of which sets of prompts are cut: prose, code, numbers, other scripts, repetition.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog and runs into the forest, where nobody has seen it since last spring.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\nprint(",
    "Once upon a time there lived an old clockmaker who could not hear the hours strike, and so he counted the birds.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946, 17711, 28657,",
    "Translate to French: The weather is nice today, but tomorrow it will rain, and we shall stay at home and read.",
    "Q: What is the boiling point of water at sea level?\nA: 100 degrees Celsius.\nQ: And on top of a mountain?\nA:",
    "La neige tombait depuis trois jours sur le village endormi, et personne n'avait encore vu passer le facteur.",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 AND placed_on >= '2024-01-01' GROUP BY name HAVING COUNT(*)",
    "the the the the the the the the the the the the the the the the the the the the the the the the the the the the",
    "In 1969 two astronauts landed on the Moon while a third stayed in orbit. Their names were spoken in every house.",
    '{"id": 17, "tags": ["a", "b"], "nested": {"deep": true, "value": null, "list": [1, 2, 3, {"x": 0.5}]}, "end":',
    "Roses are red, violets are blue, the kettle is singing, the toast is burnt too, and breakfast is late for two.",
    "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк, а потом будем пить чай на старой веранде.",
    "E = mc^2 relates energy and mass. The integral of x^2 from 0 to 1 is 1/3, and the sum of 1/n^2 over n is pi^2/6.",
    "Dear Sir or Madam,\n\nI am writing to complain about the noise that your new machines make from six on",
    '#include <stdio.h>\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf("%d\\n", i * i);\n    }',
    "The patient presented with a fever of 39.5 degrees, a dry cough, and a rash on both arms since Monday.",
    "!!! ??? ... --- *** +++ === ### @@@ $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} <<< >>> /// ||| ~~~ ``` ,,, ;;; :::",
)


def prompt_set(name: str, encode: Encode | None, vocab_size: int) -> dict[str, list[int]]:
    """Return the prompts of a set: those of a default audit for `set_0`, else some of its own, always the same ones."""
    number = int(name.removeprefix("set_"))
    if number == 0:
        return default_prompts(encode, vocab_size)
    rng = np.random.default_rng(number)
    lengths = rng.integers(_SHORTEST, _LONGEST, size=_PROMPTS_A_SET, endpoint=True)
    if encode is None:
        return {f"p{i}": rng.integers(0, vocab_size, size=n).tolist() for i, n in enumerate(lengths)}
    prompts = {}
    for i, (text, length) in enumerate(zip(rng.permutation(len(_TEXTS)), lengths, strict=False)):
        ids = list(encode(_TEXTS[text]))
        start = int(rng.integers(0, max(1, len(ids) - length)))
        prompts[f"p{i}"] = ids[start : start + int(length)]
    return prompts
