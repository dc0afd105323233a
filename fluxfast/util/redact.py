"""Text from elsewhere made safe for a line of a terminal or a log; access tokens are masked."""

import os
import re

# Hugging Face's, the one kind that this program has a use for
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}")
_SHORTEST = 8  # characters of a variable's value that is looked for
# words of a variable's name: PASSWORD, OPENAI_KEY, MYSQL_PWD, GITHUB_PAT, REDIS_URL, HTTP_AUTH
_SECRET = re.compile(
    r"token|secret|passw|passphrase|pgpass|credential|cookie|apikey"
    r"|(?<![a-z])(key|auth|pat|pass|pwd|dsn|url|uri|proxy|webhook)s?(?![a-z])",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Returns one line without access tokens, in which line breaks and characters that move the
    cursor, color or reorder text are written out, as \\x1b.
    """
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in masked(text))
    return "".join(letters)


def masked(text: str) -> str:
    """Returns the text with *** for Hugging Face's access tokens and the value of HF_TOKEN."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return _TOKEN.sub("***", text)


def holds_token(text: str) -> bool:
    """Returns whether the text holds an access token."""
    return masked(text) != text


def names_secret(variable: str) -> bool:
    """Returns whether an environment variable of this name may hold a secret."""
    return variable != "PWD" and _SECRET.search(variable) is not None
