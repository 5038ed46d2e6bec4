"""Puts prompts as people phrase them into the grammar's words, by a normalizer that any reader of tokenizer.json has.

It leaves every prompt of the grammar as it is. Each rule is a search and a literal replacement, since that is all that
the tokenizers library stores; a rule sees words of letters with one space between them.
"""

from __future__ import annotations

from tokenizers import Regex, normalizers

from steploom.demo import scene

_SHAPE = "|".join(scene.SHAPES)
_TRAIT = "|".join((*scene.SIZES, *scene.COLOURS, *scene.BACKGROUNDS))
_THING = rf"(?:a )?(?:(?:{_TRAIT}) )*(?:{_SHAPE})\b"
_BEHIND = rf"(?:a )?(?:{'|'.join(scene.BACKGROUNDS)}) background\b"
_SIDE = r"(?: hand)?(?: side)?(?: (?:of|and|with)|(?= an?\b))"
_JOINERS = ("and", "next", "beside", "with", "near", "by")

SYNONYMS = {
    "a": r"an|the(?! (?:left|right)\b)",
    "to the left of": rf"(?:on|at|to) (?:the )?left{_SIDE}",
    "to the right of": rf"(?:on|at|to) (?:the )?right{_SIDE}",
    "below": "under|underneath|beneath",
    "gray": "grey",
    "purple": "violet",
    "large": "big|huge",
    "small": "little|tiny",
    "circle": "disk|disc",
    "background": "backdrop",
}
"""What is read as each word of the grammar."""


def normalizer() -> normalizers.Sequence:
    """Return the normalizer of the built-in model's tokenizers."""
    steps = [normalizers.NFKC(), normalizers.Lowercase(), _rule(r"[^\p{L}\p{M}]+", " "), normalizers.Strip()]
    steps += [_rule(rf"\b(?:{heard})\b", meant) for meant, heard in SYNONYMS.items()]
    steps.append(_rule(rf"(?<={_SHAPE})s\b", ""))
    upon = r"(?:over|on (?:a )?top of|atop)"
    steps.append(_rule(rf"\b(?:{upon}|with|against|in front of|in)\b(?= {_BEHIND})", "on"))
    steps += [_rule(rf"\b{upon}\b", "above"), *_without_others(_JOINERS)]
    steps.append(_rule(rf"\bon\b(?= {_THING})", "above"))
    joined = rf"(?<={_SHAPE}) (?:(?:{'|'.join(_JOINERS)}|to) )*"
    steps += [_rule(joined + rf"(?={_THING})", " to the left of "), _rule(joined + rf"(?={_BEHIND})", " on ")]
    steps += _without_others(())
    steps.append(_rule(rf"\bon (?:a )?(?:{'|'.join(scene.BACKGROUNDS)})\K$", " background"))
    for name in scene.BACKGROUNDS:  # one named first is named last
        first = rf"^(?:on )?(?:a )?{name} background "
        steps += [_rule(rf"{first}.*\K$", f" on a {name} background"), _rule(rf"{first}(?=.)", "")]
    return normalizers.Sequence(steps)


def _without_others(kept: tuple[str, ...]) -> list[normalizers.Normalizer]:
    """Rules that remove words that are neither of the grammar nor ``kept``, and words of the grammar left alone."""
    words = "|".join((*scene.vocabulary(), *kept))
    alone = [
        rf"\b(?!(?:{words})\b)[\p{{L}}\p{{M}}]+\b",
        r"\b(?:left|right)\b(?! of\b)",
        r"\bthe\b(?! (?:left|right) of\b)",
        r"(?!)" if kept else r"\bto\b(?! the\b)",  # of "next to"
        r"(?<!left|right) of\b|^of\b",
        r"\ba (?=(?:a|above|below|to|on)\b)|\b(?:on )?a$",
        r"\bon\b(?=$| (?:on|above|below|to|left|right)\b)",
    ]
    rules = [_rule(one, "") for one in alone]
    return [*rules, _rule(" +", " "), normalizers.Strip()]


def _rule(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)
