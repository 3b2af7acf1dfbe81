"""Derives octets from the grammar of bsmtp(7).

usage: abnf.py rules PAGE               its rules, with those that it takes from others
       abnf.py derive PAGE RULE FILE... each FILE is a sentence of RULE
       abnf.py refuse PAGE RULE FILE... none of them is one

The grammar has no recursion, so that a rule becomes a regular expression; Python's tries
every way.  The octets of a chunk are counted here: "as many octets as stated".
"""
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def page_rules(path):
    """The blocks that the page marks as ABNF, as its reader sees them."""
    with open(path, encoding="utf-8") as f:
        page = f.read()
    blocks = re.findall(r'^\.\\" example: abnf\n\.Bd.*\n((?:.*\n)*?)\.Ed', page, re.M)
    return "".join(blocks).replace("\\&", "").replace("\\e", "\\")


def all_rules(path):
    with open(os.path.join(HERE, "smtp.abnf"), encoding="utf-8") as f:
        return page_rules(path) + f.read()


TOKEN = re.compile(r"""\s*(?:;[^\n]*\n\s*)*(?:
    (?P<name>[A-Za-z][A-Za-z0-9-]*)(?P<defines>\s*=(?!/))? | "(?P<text>[^"]*)" |
    %(?P<base>[xd])(?P<value>[0-9A-Fa-f]+(?:[-.][0-9A-Fa-f]+)*) |
    (?P<repeat>\d*\*\d*|\d+) | (?P<mark>[][()/]) )""", re.X)


class Grammar:
    def __init__(self, text):
        self.tokens, at = [], 0
        text = re.sub(r";[^\n]*", "", text).strip()
        while at < len(text):
            match = TOKEN.match(text, at)
            assert match, "no ABNF: " + text[at:at + 60]
            self.tokens.append(match)
            at = match.end()
        self.at, self.rules, self.made = 0, {}, {}
        while self.at < len(self.tokens):
            head = self.next()
            assert head["defines"], "a rule was to begin: " + head[0]
            assert head["name"].lower() not in self.rules, "twice: " + head["name"]
            self.rules[head["name"].lower()] = self.alternatives()

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def alternatives(self):
        ways = [self.sequence()]
        while self.peek() and self.peek()["mark"] == "/":
            self.next()
            ways.append(self.sequence())
        return ways

    def sequence(self):
        parts = []
        while self.peek() and self.peek()["mark"] not in (")", "]", "/") and not self.peek()["defines"]:
            parts.append(self.element())
        assert parts, "nothing stands there"
        return parts

    def element(self):
        token, least, most = self.next(), "1", "1"
        if token["repeat"]:
            least, _, most = token["repeat"].partition("*")
            most = most if "*" in token["repeat"] else least
            least, token = least or "0", self.next()
        if token["mark"] in ("(", "["):
            inner = ("group", self.alternatives())
            close = self.next()
            assert close["mark"] == {"(": ")", "[": "]"}[token["mark"]]
            least = "0" if token["mark"] == "[" else least
        elif token["name"]:
            inner = ("rule", token["name"].lower())
        elif token["base"]:
            inner = ("octets", token["value"], 16 if token["base"] == "x" else 10)
        else:
            inner = ("text", token["text"])
        return inner, least, most

    def expression(self, rule):
        if rule not in self.made:
            assert rule in self.rules, "no such rule: " + rule
            self.made[rule] = None
            # The octets of a chunk: NULs, by chunks().
            self.made[rule] = rb"\x00" if rule == "octet" else self.choice(self.rules[rule])
        assert self.made[rule] is not None, "recursion: " + rule
        return self.made[rule]

    def choice(self, ways):
        return b"(?:" + b"|".join(b"".join(self.part(*p) for p in way) for way in ways) + b")"

    def part(self, inner, least, most):
        if inner[0] == "group":
            made = self.choice(inner[1])
        elif inner[0] == "rule":
            made = self.expression(inner[1])
        elif inner[0] == "text":
            made = b"(?i:%s)" % re.escape(inner[1].encode())
        elif "-" in inner[1]:
            low, high = (int(n, inner[2]) for n in inner[1].split("-"))
            made = b"[\\x%02x-\\x%02x]" % (low, high)
        else:
            made = b"".join(b"\\x%02x" % int(n, inner[2]) for n in inner[1].split("."))
        return made if (least, most) == ("1", "1") else b"(?:%s){%s,%s}" % (made, least.encode(), most.encode())


def chunks(octets):
    """The octets of each chunk become as many NULs, where they are all there."""
    out, at, data = [], 0, False
    while at < len(octets):
        end = octets.find(b"\r\n", at)
        end = len(octets) if end < 0 else end + 2
        line, at = octets[at:end], end
        out.append(line)
        match = None if data else re.fullmatch(rb"(?i)BDAT (\d{1,20})( LAST)?\r\n", line)
        data = line != b".\r\n" if data else line.upper() == b"DATA\r\n"
        if match:
            count = int(match[1])
            assert at + count <= len(octets) or not match[2], "a chunk is cut off"
            out.append(b"\0" * min(count, len(octets) - at))
            at += count
    return b"".join(out)


def derives(pattern, octets):
    try:
        return pattern.fullmatch(chunks(octets)) is not None
    except AssertionError:
        return False


def main(verb, page, *rest):
    if verb == "rules":
        sys.stdout.write(all_rules(page))
        return
    rule, *files = rest
    grammar = Grammar(all_rules(page))
    for name in grammar.rules:
        grammar.expression(name)
    pattern = re.compile(grammar.expression(rule.lower()))
    for file in files:
        with open(file, "rb") as f:
            octets = f.read()
        assert derives(pattern, octets) == (verb == "derive"), "%s (%s %s): %r" % (file, verb, rule, octets[:2000])
    print(len(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
