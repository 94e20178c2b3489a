"""Personal addresses in text: e-mail and public IP addresses are replaced by addresses of nobody.

This is datatrove's `PIIFormatter` with expressions of our own. Its expressions take the first four numbers of
1.2.3.4.5 and the section 4.5.6.7 for an address, and the package tool@4.17.21 for one of e-mail; they know no
IPv6 and only ASCII letters. It also goes on through its replacements from document to document, so a document
would depend on the documents before it.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator

from datatrove.pipeline.formatters.base import BaseFormatter

# The replacements of datatrove, in its order. The IPv6 addresses are reserved for documentation (RFC 3849).
EMAILS = ("email@example.com", "firstname.lastname@example.org")
IPV4 = (
    *("22.214.171.124", "126.96.36.199", "188.8.131.52"),
    *("184.108.40.206", "220.127.116.11", "18.104.22.168"),
)
IPV6 = ("2001:db8::1", "2001:db8::2", "2001:db8::3")

# Letters and digits of an address: Latin, Greek and Cyrillic, composed or with combining marks. In scripts
# without spaces between words an address would take the words before it along.
_LETTER = r"A-Za-zÀ-ÖØ-öø-ʯͰ-ϿЀ-ԯ\u1e00-\u1eff\u0300-\u036f"
_WORD = rf"{_LETTER}0-9"
_ATOM = rf"[{_WORD}!#$%&'*+/=?^_`{{|}}~-]+"
_LONGEST_LOCAL = 64  # letters before the @ (RFC 5321)
_LOCAL = re.compile(rf"(?<![{_WORD}_])(?=[{_WORD}_]){_ATOM}(?:\.{_ATOM})*\Z")
_LABEL = rf"[{_WORD}](?:[{_WORD}-]*[{_WORD}])?"
# The last label has no digits, or it is an encoded one (xn--): tool@4.17.21 is a version.
_DOMAIN = re.compile(
    rf"(?:{_LABEL}\.)+(?:xn--[A-Za-z0-9-]+|[{_LETTER}]{{2,}})(?![{_WORD}])|\[[0-9A-Fa-f.:]+\]"
)
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
# Four numbers, and not part of a longer row of numbers or of a word (v1.2.3.4).
_IPV4 = re.compile(rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\w|\.[0-9])")
# Global addresses begin with 2 or 3 (2000::/3), which no name of a program does: a::b is none.
_IPV6 = re.compile(
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?:::?[0-9A-Fa-f]{1,4}){1,7}(?:::)?(?!\w|:[0-9A-Fa-f]|\.[0-9])"
)
# Words before four numbers that say what they number, and numbers between: "sections 1.2.3.4 and 1.2.3.5".
_NUMBERED = re.compile(
    r"(?:\b(?:sections?|secs?|chapters?|clauses?|articles?|paragraphs?|figures?|figs?|tables?|appendix|annex|"
    r"requirements?|versions?|vers?|v|releases?|revisions?|builds?|firmware|oid)\b\.?:?|\u00a7\u00a7?)\s*"
    r"(?:[0-9.]+\s*(?:,|;|&|-|\u2013|/|and|or|to|through)\s*)*\Z",
    re.IGNORECASE,
)
_BEFORE = 80  # characters that are looked at for these words


class Pii(BaseFormatter):
    """Replaces addresses; the replacements begin anew in each document."""

    name = "pii"

    def format(self, text: str) -> str:
        if "@" in text:
            text = _without_emails(text)
        ipv4, ipv6 = itertools.cycle(IPV4), itertools.cycle(IPV6)
        text = _IPV6.sub(_replacing(_is_global, ipv6), text)
        return _IPV4.sub(_replacing(lambda found: _is_global(found) and not _numbers(found), ipv4), text)


def _without_emails(text: str) -> str:
    replacements = itertools.cycle(EMAILS)
    parts, done = [], 0
    for at in re.finditer("@", text):
        begin = max(done, at.start() - _LONGEST_LOCAL - 1)
        local, domain = _LOCAL.search(text[begin : at.start()]), _DOMAIN.match(text, at.end())
        if local and domain and len(local[0]) <= _LONGEST_LOCAL:
            parts += [text[done : begin + local.start()], next(replacements)]
            done = domain.end()
    return "".join([*parts, text[done:]])


def _replacing(
    concerned: Callable[[re.Match[str]], bool], replacements: Iterator[str]
) -> Callable[[re.Match[str]], str]:
    return lambda found: next(replacements) if concerned(found) else found[0]


def _is_global(found: re.Match[str]) -> bool:
    """Whether an address is one and may lead to somebody, which those of private networks do not."""
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


def _numbers(found: re.Match[str]) -> bool:
    """Whether the words before four numbers say that they number a section or a version."""
    begin = max(0, found.start() - _BEFORE)
    return _NUMBERED.search(found.string[begin : found.start()]) is not None
