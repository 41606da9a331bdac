"""The words that the `tiny` localizer knows: tokenizer, vocabulary and the gate that refuses everything else.

A prompt passes when each of its words is listed and together they name exactly one structure. Filler words are dropped;
the others become token ids for the text encoder. Laterality is the patient's: "left lung" is the lung at image right in
radiological view. The gate only admits or refuses; what a prompt means to the network is learnt from its tokens.
"""

from __future__ import annotations

import re

from .protocol import PromptRefused
from .tiny_words import ALIASES, CONCEPTS, FILLERS, NEGATIONS, STRUCTURES

__all__ = ["MAX_TOKENS", "STRUCTURES", "TOKENS", "encode_prompt", "parse_prompt", "vocabulary_text", "words_of"]

OTHERS = ('Use a localizer with an open vocabulary ("clipseg" with a checkpoint) or masks that you have ("maps"); '
          "`mwm localize --vocabulary` lists what tiny knows.")
MAX_TOKENS = 16

_CONCEPT_OF = {word: concept for concept, words in CONCEPTS.items() for word in words}
TOKENS: tuple[str, ...] = ("<pad>", *sorted(_CONCEPT_OF))
_TOKEN_IDS = {token: k for k, token in enumerate(TOKENS)}


def words_of(prompt: str) -> list[str]:
    """Lower-case words of a prompt; "X-ray" is one word, digits and a possessive 's are dropped, aliases replaced."""
    text = prompt.lower().replace("\u2019", "'")
    text = re.sub(r"'s\b|s'(?=\s|$)", " ", text)
    text = re.sub(r"\bx[\s-]*rays?\b", "xray", text)
    text = re.sub(r"\bt([12])(?:[\s-]*w(?:eighted)?)?\b", r"t\1w", text)
    return [ALIASES.get(word, word) for word in re.findall(r"[^\W\d_]+[12]?[^\W\d_]*", text)]


def _refuse(prompt: str, reason: str) -> PromptRefused:
    shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    return PromptRefused(f'tiny: prompt must name one structure that tiny knows, got "{shown}" ({reason}). {OTHERS}')


def parse_prompt(prompt: str) -> str:
    """Name of the structure that a prompt asks for.

    Args:
        prompt: English text, for example "the brain tumour in this MRI slice".

    Returns:
        One of `STRUCTURES`.

    Raises:
        TypeError: the prompt is no string.
        ValueError: a word outside the vocabulary, a negation, no structure, or more than one.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"tiny: prompt must be a string, got {type(prompt).__name__}.")
    words = words_of(prompt)
    if not words:
        raise _refuse(prompt, "no words")
    unknown = [w for w in words if w not in _CONCEPT_OF and w not in FILLERS and w not in NEGATIONS]
    if unknown:
        raise _refuse(prompt, "outside its vocabulary: " + ", ".join(dict.fromkeys(unknown)))
    concepts = {_CONCEPT_OF[w] for w in words if w in _CONCEPT_OF}
    lungs = "lung" in concepts or ("pulmonary" in concepts and "field" in concepts)
    kinds = concepts & {"glioma", "meningioma", "adenoma"}
    pituitary = "pituitary" in concepts and bool(concepts & {"tumour", "mass", "adenoma"})
    generic = "tumour" in concepts or ("mass" in concepts and "brain" in concepts)
    tumour = bool(kinds) or pituitary or generic
    negated = [w for w in words if w in NEGATIONS and not (lungs and w in {"healthy", "normal"})]
    if negated:
        raise _refuse(prompt, f'"{negated[0]}" asks for what is absent; name what to find')
    if lungs and (tumour or "mass" in concepts):
        raise _refuse(prompt, "a lesion of the lung, or two structures at once")
    if tumour:
        if concepts & {"left", "right", "both"}:
            raise _refuse(prompt, "it tells left from right for lungs only")
        if concepts & {"pulmonary", "chest"} and "brain" not in concepts:
            raise _refuse(prompt, "the tumours it knows are those of the brain")
        named = {"pituitary_tumour" if kind == "adenoma" else kind for kind in kinds} | ({"pituitary_tumour"} if pituitary else set())
        if len(named) > 1 or ("pituitary" in concepts and not pituitary):
            raise _refuse(prompt, "two kinds of tumour at once")
        return named.pop() if named else "brain_tumour"
    if lungs:
        if concepts & {"brain", "pituitary"} and "modality" not in concepts:
            raise _refuse(prompt, "two structures at once")
        sides = concepts & {"left", "right"}
        return f"{sides.pop()}_lung" if len(sides) == 1 and "both" not in concepts else "lungs"
    raise _refuse(prompt, "no structure that it knows")


def encode_prompt(prompt: str) -> list[int]:
    """Token ids of a prompt without its filler words, at most `MAX_TOKENS`. The prompt has passed `parse_prompt`."""
    return [_TOKEN_IDS[w] for w in words_of(prompt) if w in _TOKEN_IDS][:MAX_TOKENS]


def vocabulary_text() -> str:
    """The listed vocabulary as text: structures with example prompts, the words by meaning, and the filler words."""
    lines = ["Structures that tiny finds (left and right are the patient's):"]
    lines += [f"  {name:17s} e.g. \"{example}\", on {where}" for name, (example, where) in STRUCTURES.items()]
    lines.append("Words that carry meaning:")
    lines += [f"  {concept:10s} {', '.join(words)}" for concept, words in CONCEPTS.items()]
    lines.append("Read as one of these: " + ", ".join(f"{word} ({listed})" for word, listed in ALIASES.items()))
    lines.append("Filler words, ignored:")
    row = "  "
    for word in sorted(FILLERS):
        if len(row) + len(word) > 116:
            lines.append(row.rstrip())
            row = "  "
        row += word + " "
    lines += [row.rstrip(), "Refused: every other word, negations (" + ", ".join(sorted(NEGATIONS)) + "), and prompts that name no "
              "structure or more than one."]
    return "\n".join(lines)
