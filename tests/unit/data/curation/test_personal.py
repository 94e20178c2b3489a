"""Which addresses in a text are replaced, and what stays although it looks like one."""

from __future__ import annotations

from snaketron.data.curation.personal import EMAILS, IPV4, IPV6, Pii

import pytest

MAIL, IP, IP6 = EMAILS[0], IPV4[0], IPV6[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to joe.doe+x@corp.co.uk.", f"Write to {MAIL}."),
        ("'ann@corp.com', <mailto:a_b@x-y.org>", f"'{MAIL}', <mailto:{EMAILS[1]}>"),
        ("jürgen.groß@müller.de, почта@пример.рф", f"{MAIL}, {EMAILS[1]}"),
        ("ju\u0308rgen@mu\u0308ller.de", MAIL),
        ("joe@xn--mller-kva.de joe@mail.xn--p1ai", f"{MAIL} {EMAILS[1]}"),
        ("联系joe@corp.com吧", f"联系{MAIL}吧"),  # no spaces: the words around it stay
        ("wait...joe@corp.com!", f"wait...{MAIL}!"),
        ("root@[8.8.8.8]", MAIL),
        ("a@b.com,c@d.com,e@f.com", f"{MAIL},{EMAILS[1]},{MAIL}"),
    ],
)
def test_email_addresses_are_replaced(text: str, expected: str):
    assert Pii().format(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Nothing here @ all, @joe, joe@localhost",
        "npm install tool@4.17.21 other@1.2",  # versions
        "用户@例子.广告",  # of scripts without spaces between words
        f"{'x' * 65}@corp.com",  # too long for an address
        "joe.@corp.com joe@-corp",
    ],
)
def test_what_is_no_email_address_stays(text: str):
    assert Pii().format(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The server is 8.8.8.8.", f"The server is {IP}."),
        ("(8.8.8.8), 1.1.1.1:53, 9.9.9.9/32", f"({IP}), {IPV4[1]}:53, {IPV4[2]}/32"),
        ("DNS 2001:4860:4860::8888, [2606:4700:4700::1111]:53.", f"DNS {IP6}, [{IPV6[1]}]:53."),
        ("2a00:1450:4001:0827:0000:0000:0000:200e: up", f"{IP6}: up"),
        ("::ffff:8.8.8.8", f"::ffff:{IP}"),
        ("4.5.6.7 is a number or an address", f"{IP} is a number or an address"),  # nothing tells
    ],
)
def test_public_ip_addresses_are_replaced(text: str, expected: str):
    assert Pii().format(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "192.168.1.7, 10.0.0.1, 127.0.0.1, fe80::1, fd00::12, 2001:db8::1",  # lead to nobody
        "Section 4.5.6.7 of it; see sec. 4.5.6.7, §4.5.6.7 and Figure 4.5.6.7",
        "sections 4.5.6.7, 4.5.6.8 and 4.5.6.9",
        "version 4.5.6.7, Version: 4.5.6.7, v4.5.6.7, v 4.5.6.7, release 4.5.6.7",
        "1.2.3.4.5, 1.3.6.1.4.1, 11.22.33.444, 8.8.8.8x, 08.8.8.8, 1.2.3",
        "12:30:45, a::b, std::vector, dead::beef, 2024:11, 2001:zz::1, 3000:",
    ],
)
def test_what_is_no_public_ip_address_stays(text: str):
    assert Pii().format(text) == text


def test_what_becomes_of_a_text_does_not_depend_on_others():
    formatter = Pii()
    for text in ("a@b.com 8.8.8.8 2606:4700:4700::1111", "a@b.com 8.8.8.8 2606:4700:4700::1111"):
        assert formatter.format(text) == f"{MAIL} {IP} {IP6}"


def test_a_long_text_without_a_space_is_looked_through_once():
    """An expression that began at each of these letters would take the square of their number."""
    text = "a-" * 200_000 + "@" + "b." * 200_000
    assert Pii().format(text) == text
