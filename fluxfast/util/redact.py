"""Text from elsewhere on a line of a terminal or a log: it acts on nothing, and no access token is
shown.
"""

import os
import re

# Hugging Face's, the one kind that this program has a use for
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # characters of a variable's value that is looked for
# words of a variable's name: PASSWORD, OPENAI_KEY, MYSQL_PWD, GITHUB_PAT, REDIS_URL, HTTP_AUTH
_SECRET = re.compile(
    r"token|secret|passw|passphrase|pgpass|credential|cookie|apikey"
    r"|(?<![a-z])(key|auth|pat|pass|pwd|dsn|url|uri|proxy|webhook)s?(?![a-z])",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """One line: what moves a cursor, colors or reorders is written as \\x1b, line breaks too, and
    access tokens as ***.
    """
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in masked(text))
    return "".join(letters)


def masked(text: str) -> str:
    """The text without access tokens: Hugging Face's by their form, and what HF_TOKEN holds."""
    for value in _values():
        text = text.replace(value, "***")
    return _TOKEN.sub("***", text)


def holds_token(text: str) -> bool:
    """Whether `masked` would change the text."""
    return masked(text) != text


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name may hold what nobody else is to see."""
    return variable != "PWD" and _SECRET.search(variable) is not None


def _values() -> list[str]:
    values = (os.environ.get(name, "").strip() for name in _VARIABLES)
    return [value for value in values if len(value) >= _SHORTEST]
