r"""Answers as strings: where a completion states its answer, and which spellings of an answer are the same.

Everything takes time linear in its input: a policy in training writes anything. Meaning (1/2 and 0.5) is for the verifier.
"""

import re
from decimal import Decimal
from fractions import Fraction
from string import ascii_letters
from typing import NamedTuple

BOXED = ("never", "fallback", "only")
STRICT_TAIL = 100  # characters that `boxed="only"` looks at

_ANSWER = re.compile(r"answer[*_` \t]*[:：]", re.IGNORECASE)
_GSM8K = re.compile(r"^[ \t]*####", re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s$]+")


def final_answer(text: str, *, boxed: str = "fallback", tail: int = 300) -> str | None:
    r"""What `text` gives as its answer, or None.

    An answer is the rest of the line after the last `Answer:` (in any case, with Markdown around it or not), or the content of
    `\boxed{}` where that line has one. A line with nothing after the colon has no answer.

    Args:
        boxed: "never" reads nothing else; "fallback" takes the last `\boxed{}` where no such line has an answer; "only" takes
            the exact content of the last `\boxed{}` in the last 100 characters and no `Answer:` line.
        tail: how many of the last characters are looked at, unless `boxed` is "only".

    Raises:
        ValueError: an unknown `boxed`, or `tail` < 1.
    """
    if boxed not in BOXED:
        raise ValueError(f"`boxed` must be one of {BOXED}, got {boxed!r}")
    if tail < 1:
        raise ValueError(f"`tail` must be at least 1, got {tail}")
    if boxed == "only":
        boxes = _boxes(text[-STRICT_TAIL:])
        return text[-STRICT_TAIL:][boxes[-1].start : boxes[-1].stop] if boxes else None
    text = text[-tail:]
    line = None
    for match in _ANSWER.finditer(text):
        line = match.end()
    if line is not None:
        end = text.find("\n", line) % (len(text) + 1)  # -1 is the last position
        answer = _last_boxes(text, line, end) or _without_markdown(text[line:end])
        if answer:
            return answer
    return (_last_boxes(text, 0, len(text)) or None) if boxed == "fallback" else None


def gold_answer(text: str) -> str:
    r"""The answer of a worked solution: what follows the last `####`, as in GSM8K, or its last `\boxed{}`, as in MATH.

    A text with neither is the answer.
    """
    last = None
    for match in _GSM8K.finditer(text):
        last = match.end()
    marked = text[last:].strip() if last is not None else ""
    return marked or _last_boxes(text, 0, len(text)) or text.strip()


class _Box(NamedTuple):
    first: int  # of the command
    start: int  # of the content
    stop: int
    past: int


def _boxes(text: str, start: int = 0, stop: int | None = None) -> list[_Box]:
    r"""Every complete `\boxed{}` that begins in [start, stop)."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    boxes = []
    commands = list(_BOX.finditer(text, start, len(text) if stop is None else stop))
    limits = [*(command.start() for command in commands[1:]), len(text)]
    for command, limit in zip(commands, limits, strict=False):
        inside = command.end()
        if text[inside : inside + 1] == "{":
            if inside in closing:
                boxes.append(_Box(command.start(), inside + 1, closing[inside], closing[inside] + 1))
        # TeX: without braces, the argument is what follows.
        elif word := _BARE.match(text, inside, limit):
            end = inside + len(word[0].rstrip(".,;"))
            boxes.append(_Box(command.start(), inside, end, end))
    return boxes


def _last_boxes(text: str, start: int, stop: int) -> str:
    r"""Content of the last box; of several where only commas, `and` or `or` stand between them: 3 and 4 is not the answer 4."""
    contents: list[str] = []
    after = None
    for box in reversed(_boxes(text, start, stop)):
        if after is not None:
            if box.past > after:  # around the one that was read
                continue
            if text[box.past : after].replace(r"\text", "").strip(" \t\r\n$,;{}") not in ("", "and", "or"):
                break
        contents.append(text[box.start : box.stop].strip())
        after = box.first
    return ", ".join(dict.fromkeys(reversed(contents)))


def _without_markdown(line: str) -> str:
    line = line.strip()
    for marks in ("**.", "__.", "`."):
        line = line.removesuffix(marks)
    line = line.lstrip("}").strip("*_` \t")  # of \textbf{Answer:} and **Answer:**
    if line.endswith("^"):
        line += "*"  # it was an exponent
    return line if line.strip("$\\[( ") else ""  # a formula that opens here and continues on the next line


class Reading(NamedTuple):
    """An answer taken apart."""

    name: str  # what stands left of the "=", if anything
    value: str
    unit: str

    @property
    def equation(self) -> str:
        return f"{self.name} = {self.value}" if self.name else self.value


def normalise(answer: str) -> str:
    """`answer` without unit, `x =`, dollars, text commands, thousands commas, spaces; with fractions and roots in braces.

    A percent sign stays: it changes the value.
    """
    return read(answer).value


_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−﹣－", "-"),
        **dict.fromkeys('\u200b\u200e\u2060\ufeff€£¥₹“”"`', ""),
        **dict.fromkeys("，、", ", "),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict(zip("０１２３４５６７８９", "0123456789", strict=True)),
        "×": r"\times ",
        "÷": r"\div ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "θ": r"\theta ",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "（": "(",
        "）": ")",
        "：": ":",
        "。": ".",
    }
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|hbox) ?\{([^{}]*)\}")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
# (pattern, replacement), in this order. Patterns meet single spaces only, so ` ?` is all they need.
_SPELLINGS = [
    (re.compile(r"√ ?(\d+(?:\.\d+)?)"), r"\\sqrt{\1}"),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"\\!|\\?\$|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?|\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(rf"\\operatorname\*? ?\{{ ?({_FUNCTIONS}) ?\}}"), r"\\\1 "),
    # Degrees, which math-verify ignores too.
    (re.compile(r"(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z]))(?: ?[CF](?![a-zA-Z]))?"), ""),
]
_FORMULAS = [
    (re.compile(r"(\d)\{ ?, ?\}(?=\d{3})"), r"\1"),
    (re.compile(rf"(?<![a-zA-Z\\])({_FUNCTIONS}|pi|theta|infty)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"(?<![a-zA-Z\\])infinity(?![a-zA-Z])"), r"\\infty"),
    (re.compile(r"\\?(?<![a-zA-Z])sqrt ?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt(?![a-zA-Z])"), r"\\sqrt"),
    (re.compile(r"\\sqrt ?([0-9a-zA-Z])(?![a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac ?(\\pi|[0-9a-zA-Z]) ?(\\pi|[0-9a-zA-Z])(?![a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac ?(\\pi|[0-9a-zA-Z]) ?\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac ?\{[^{}]*\}) ?([0-9a-zA-Z])"), r"\1{\2}"),
    (re.compile(r"(\d) ?[xX] ?(?=10 ?\^)"), r"\1\\times "),
    (re.compile(r" (?=[^\w ])|(?<=[^\w ]) "), ""),
    (re.compile(r","), ", "),
]
# Of a whole value.
_NUMBERS = [
    (re.compile(r"(?:\+|\\approx ?)(.+)"), r"\1"),
    (re.compile(r"(-?)(\.\d+)"), r"\g<1>0\2"),
    (re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]\+?(-?)0*(\d+)"), r"\1\\times10^{\2\3}"),
    (re.compile(r"(-?)(\d+) (\d+)/(\d+)"), r"\1\2\\frac{\3}{\4}"),
    (re.compile(r"(-?)(\d+)/(\d+)"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"[(\[{]?([a-zA-Z])[)\]}]?"), r"\1"),  # a choice
]
# Bold and italic letters are vectors rather than units.
_TEXT_UNIT = re.compile(
    r"(?<=[0-9a-zA-Z})]) ?\\(?:text|textrm|textnormal|mathrm|mbox|hbox) ?\{([^{}]*)\} ?(?:\^ ?\{? ?([23]) ?\}?)?$"
)
_PLAIN_UNIT = re.compile(r" ?\^ ?\{? ?([23]) ?\}?$")
_REPEATING = re.compile(r"(-?)(\d{0,30})\.(\d{0,30})\\(?:overline|bar) ?\{(\d{1,30})\}")
_ORDINAL = re.compile(r"(?<=\d) ?(?:\^ ?\{? ?)?(?:th|st|nd|rd) ?\}?$")
_PERCENT = re.compile(r" ?\\?%| ?\bper ?cent(?:age)?\b| ?\bpct\b")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_SPACE_GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?")
_SYNTAX = re.compile(r"\\.|[()\[\]{}=,;]|\b(?:and|or|if)\b")
_NEGATIONS = ("<", ">", "!", "/", r"\not")  # before a "=" that is none
_NUMBER = re.compile(r"[-+]?[\d,.]+(?: ?/ ?\d+)?")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
_INTEGER = re.compile(r"-?\d+", re.ASCII)
_LETTERS = re.compile(r"\\?[a-zA-Z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{[a-zA-Z*]*\}")
_MATH_WORDS = ("and", "mod", "max", "min", "gcd", "lcm", "lim", "det")
# A number beside another: math-verify reads 3 4 and 3{4} as a mixed number, 3 + 4. \log_2 8 is none.
_GAP = re.compile(r"(?:^|[^\d._^])[\d.]+(?: \{?|\{) ?\d")
_BASE = re.compile(r"\d_\{? ?(\d+)")
_PUNCTUATION = re.compile(r"[^\w+\-*/^=<>.]")
_ARTICLE = re.compile(r"^(?:an?|the) ")


def read(answer: str) -> Reading:
    """Take `answer` apart and bring its parts to one spelling."""
    text = " ".join(answer.translate(_CHARACTERS).split())
    text = _last_boxes(text, 0, len(text)) or text
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text, unit = _split_text_unit(_stripped(text))
    for _ in range(3):  # nested at most so deep
        text = _TEXT.sub(lambda match: f" {match[1]} " if len(match[1]) > 1 else match[1], text)
    text = _PERCENT.sub(r"\\%", _stripped(text))
    name, value = _split_equation(text)
    if not unit:
        value, unit = _split_unit(value)
    value = _ORDINAL.sub("", _join_thousands(value))
    for pattern, replacement in _FORMULAS:
        value = pattern.sub(replacement, value)
    value = value.strip()
    for pattern, replacement in _NUMBERS:
        if match := pattern.fullmatch(value):
            value = match.expand(replacement)
    if match := _REPEATING.fullmatch(value):
        value = _fraction(*match.groups())
    return Reading(name.replace(" ", ""), value, unit)


def _stripped(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] == "'":
        text = text[1:-1]
    return text if text.endswith("...") else text.rstrip(" .,;:")


def _split_equation(text: str) -> tuple[str, str]:
    """(first name, what follows the last "=") unless there are several equations: "x = 3, y = 4" is not the answer 4."""
    depth, equals = 0, []
    for symbol in _SYNTAX.finditer(text):
        if symbol[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif symbol[0] in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth or symbol[0][0] == "\\":
            continue
        elif symbol[0] == "=":
            if not text[max(symbol.start() - 5, 0) : symbol.start()].rstrip().endswith(_NEGATIONS):
                equals.append(symbol.start())
        elif "=" in text[symbol.end() :]:
            return "", text
        else:
            break
    if not equals:
        return "", text
    name = text[: equals[0]]
    return ("" if has_words(name) else name), text[equals[-1] + 1 :].strip()


def _join_thousands(value: str) -> str:
    """Without thousands separators. "(1,234)" may be a pair, "(1,000, 2)" cannot be a triple."""
    if _SPACE_GROUPED.fullmatch(value):
        return value.replace(" ", "")
    if ", " not in value and any(bracket in value for bracket in ("(", "[", r"\{")):
        return value
    return _GROUPED.sub(lambda match: match[0].replace(",", ""), value)


def _fraction(sign: str, whole: str, fixed: str, period: str) -> str:
    """A repeating decimal."""
    part = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
    value = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed)) + part
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


# The first spelling of a line stands for all; plurals with "s" are understood.
_UNITS = {
    spelling: spellings.split()[0]
    for spellings in (
        *("mm millimeter millimetre", "cm centimeter centimetre", "dm decimeter decimetre", "m meter metre"),
        *("km kilometer kilometre", "in inch inches", "ft foot feet", "yd yard", "mi mile"),
        *("mg milligram", "g gram", "kg kilogram", "lb pound", "oz ounce", "ton tonne"),
        *("ml milliliter millilitre", "l liter litre", "gal gallon", "ms millisecond", "s sec second", "min minute"),
        *("h hr hour", "day", "week", "month", "yr year", "mi/h mph", "km/h kmh kph", "usd dollar", "cent", "euro", "rupee rs"),
        *("degree deg", "c celsius", "f fahrenheit", "rad radian", "unit", "j joule", "n newton", "w watt", "v volt"),
        *("hz hertz", "pa pascal", "am", "pm"),
    )
    for spelling in spellings.split()
}
# In plain text, a shorter name than three letters is a variable unless it is one of the first, or of the second after a space.
_PLAIN = ("mm", "cm", "km", "ft", "yd", "mg", "kg", "lb", "oz", "ml", "hr", "am", "pm", "AM", "PM")
_SPACED = ("m", "g", "s", "h", "l")
_PHRASE = re.compile(r"(?:(square|sq\.?|cubic|cu\.?) )?([a-z.]+)(?: ?(?:/|per) ?([a-z]+))?")
# Words after a number that are part of the value.
_AMOUNT = re.compile(
    "hundred|thousand|[a-z]+illion|dozen|score|half|halves|thirds?|quarters?|[a-z]+ths?|squared|cubed|factorial|percent|percentage|"
    "pct|times|plus|minus|modulo|mod|over|and|not|nor|less|more|least|most|above|below|under|to|from|negative|approximately"
)


def _split_text_unit(text: str) -> tuple[str, str]:
    r"""(the rest, unit) where `text` ends with a unit in `\text{}`."""
    match = _TEXT_UNIT.search(text)
    unit = match and _unit(match[1].strip(), match[2])
    return (text[: match.start()], unit) if match and unit else (text, "")


def _split_unit(value: str) -> tuple[str, str]:
    """(the rest, unit) where words after a number are a unit or the thing that is counted."""
    power = _PLAIN_UNIT.search(value)
    body = value[: power.start()] if power else value
    rest = body.rstrip(ascii_letters + " ./")
    phrase = body[len(rest) :]
    if rest.endswith("\\"):  # a command such as \pi
        command, _, phrase = phrase.partition(" ")
        rest += command
    if not rest or not (rest[-1].isalnum() or rest[-1] in "})"):
        return value, ""
    is_number = _NUMBER.fullmatch(rest) is not None
    name = phrase.strip(" .")
    if len(name) < 3 and name not in _PLAIN and not (is_number and phrase.startswith(" ") and name in _SPACED):
        return value, ""
    unit = _unit(name, power[1] if power else None, counted=is_number and not power)
    return (rest, unit) if unit else (value, "")


def _unit(phrase: str, power: str | None, counted: bool = True) -> str:
    """One spelling of a unit, or of the noun where things are `counted`; "" for other phrases."""
    match = _PHRASE.fullmatch(phrase.casefold().replace("p.m", "pm").replace("a.m", "am"))
    if match is None:
        return ""
    names = []
    for word in filter(None, match.group(2, 3)):
        known = word if word in _UNITS else word.removesuffix("s")
        is_noun = counted and phrase == word.strip(".") and _is_word(word)
        if known not in _UNITS and (not is_noun or _AMOUNT.fullmatch(word)):
            return ""
        names.append(_UNITS.get(known, known))
    size = power or {"": "", "s": "2", "c": "3"}[(match[1] or "")[:1]]
    return "/".join(names) + (f"^{size}" if size else "")


def _is_word(letters: str) -> bool:
    """Whether a run of letters is a word rather than a product of variables."""
    return len(letters) > 2 and not set("aeiou").isdisjoint(letters) and not set("abcxyz").issuperset(letters)


def has_words(text: str) -> bool:
    """Whether `text` holds words. Algebra multiplies letters: "not 0" is 0, and "ACB" is "ABC"."""
    for match in _LETTERS.finditer(_ENVIRONMENT.sub("", text)):
        letters = match[0].casefold()
        if (
            letters[0] != "\\"
            and letters not in _MATH_WORDS
            and (_is_word(letters) or (match[0].isupper() and len(letters) > 2))
        ):
            return True
    return False


def is_formula(value: str) -> bool:
    """Whether algebra can be trusted to read a normalised value as it was meant."""
    depth = 0
    for brace in _BRACE.finditer(value):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return False
    return bool(value) and depth == 0 and not has_words(value) and not _GAP.search(value)


def same(gold: Reading, answer: Reading) -> bool:
    """Whether the spellings alone say that two answers are equal."""
    if not gold.value or differ(gold, answer) or (gold.name and answer.name and gold.name != answer.name):
        return False
    if gold.value == answer.value:
        return True
    if has_words(gold.value):
        return _prose(gold.value) == _prose(answer.value)
    if _DECIMAL.fullmatch(gold.value) and _DECIMAL.fullmatch(answer.value):
        return Decimal(gold.value) == Decimal(answer.value)
    # "50%" answers "what percentage", to which 50 is the gold; but a gold of 0.5 more likely means 50%.
    number = gold.value.removesuffix(r"\%")
    return number == answer.value.removesuffix(r"\%") and bool(_DECIMAL.fullmatch(number)) and abs(float(number)) >= 1


def differ(gold: Reading, answer: Reading) -> bool:
    """Whether two answers differ beyond doubt, or in what algebra does not see: units, bases, brackets, how many there are."""
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return True
    if _INTEGER.fullmatch(gold.value) and _INTEGER.fullmatch(answer.value):
        return Decimal(gold.value) != Decimal(answer.value)
    bases = set(_BASE.findall(gold.value)), set(_BASE.findall(answer.value))
    if all(bases) and bases[0] != bases[1]:
        return True
    for one, other in ((gold.value, answer.value), (answer.value, gold.value)):
        if one.startswith(r"\{") and other.startswith(("(", "[")) and r"\cup" not in other:
            return True
    is_single = not gold.value.startswith(("(", "[", r"\{", r"\begin", r"\langle")) and r"\pm" not in gold.value
    return is_single and _has_list(answer.value) and not _has_list(gold.value)


def _has_list(value: str) -> bool:
    depth = 0
    for symbol in _SYNTAX.finditer(value):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(symbol[0], 0)
        if depth == 0 and symbol[0] in (",", ";", "or", "and"):
            return True
    return False


def _prose(text: str) -> str:
    words = " ".join(_PUNCTUATION.sub(" ", text.casefold()).split())
    return _ARTICLE.sub("", words)
