"""Mail to send, and what became of it.

usage: mail.py make N [SPICE]        N messages, no two alike, as an mbox; SPICE, any of
                                     "refused", "later", "forbidden", strews them with
                                     recipients and subjects that a peer is told not to
                                     take; "burst": 11 to 30 have no other recipient;
                                     "large": of a megabyte each; "ended": none ends in
                                     an empty line
       mail.py data OUT              Python's own test data: OUT/n.eml, OUT.mbox, OUT.maildir
       mail.py split MBOX DIR        its messages as DIR/n.eml
       mail.py same WANT GOT         the two hold the same messages, to the octet
       mail.py check SENT WANT GOT   SENT, the report of send --json, says of each message
                                     and recipient what GOT holds and what was to be;
                                     what was counted goes to SENT.counts

WANT and GOT are mboxes, Maildirs, or folders of .eml files (with .json beside
them for the envelopes), of smtp-sink's dumps, or of Maildirs.  Trace headers,
which a store puts before a message, are not compared.  Prints what was found.
"""
import collections
import glob
import json
import mailbox
import os
import random
import re
import sys

DATA = "/usr/lib/python3.11/test/test_email/data/msg_*.txt"
LISTENER = re.compile(rb"Return-Path: .*\n(?:Delivered-To: .*\n)*Received: .*\n(?:\t.*\n)*"
                      rb"(?:Received: from root by .*\n(?:\t.*\n)*)?")    # Exim's, where it relayed
TRACE = re.compile(
    rb"(?:(?:Return-Path|X-Original-To|Delivered-To|Received|Envelope-to|Delivery-date"
    rb"|X-Client-Addr|X-Client-Proto|X-Helo-Args|X-Mail-Args|X-Rcpt-Args): .*\n(?:[ \t].*\n)*)+",
    re.I)
RCPT = re.compile(rb"^(?:Delivered-To|Envelope-to|X-Rcpt-Args): <?([^>\n]*)>?$", re.I | re.M)
FROM = re.compile(rb"^(?:Return-Path: |X-Mail-Args: )<([^>\n]*)>", re.I | re.M)
ID = re.compile(rb"^Message-ID: (.*)$", re.I | re.M)


def normal(octets):
    """As a store that ends lines in LF holds what was sent."""
    octets = re.sub(rb"\r(?!\n)", b" ", octets).replace(b"\r\n", b"\n")
    return octets if octets.endswith(b"\n") or not octets else octets + b"\n"


def read(path):
    """The messages of a store, and the file of each, None in an mbox."""
    if os.path.isfile(path):
        box = mailbox.mbox(path, create=False)
        for key in box.iterkeys():
            yield normal(re.sub(rb"^>(>*From )", rb"\1", box.get_bytes(key), flags=re.M)), None
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            if not name.endswith(".json") and os.path.basename(folder) != "tmp":
                with open(file, "rb") as f:
                    yield normal(f.read()), file


def make(count, spice):
    pick = random.Random(2018)
    for n in range(1, count + 1):
        to = [["b"], ["c"], ["b", "c"]][n % 3]
        if "refused" in spice and n % 4 == 0:
            to.insert(n // 4 % 2, "no")
        if "refused" in spice and n % 10 == 9:
            to = ["no"]
        if "burst" in spice and 10 < n <= 30:
            to = ["no"]
        if "later" in spice and n % 6 == 3:
            to.append("later")
        subject = "forbidden" if "forbidden" in spice and n % 7 == 5 else "number %d" % n
        lines = [
            b"From a%d@example.org Mon Nov 23 12:00:00 2026" % n,
            b"Date: Mon, 23 Nov 2026 12:00:00 +0000",
            b"From: A%d <a%d@example.org>" % (n, n),
            b"To: " + b",\n\t".join(b"%s@example.net" % r.encode() for r in to),
            b"Message-ID: <%d@made.example>" % n,
            b"Subject: " + subject.encode(), b"MIME-Version: 1.0",
            b"Content-Type: text/plain; charset=utf-8", b"Content-Transfer-Encoding: 8bit", b"",
        ]
        if "large" in spice:
            lines += [b"x" * 76] * 13000
        for _ in range(pick.choice([0, 1, 5, 20, 100])):
            lines.append(pick.choice([
                b".", b"..", b". x", b".QUIT", b"", b" ", b"\t", b">From here on", b">>From there",
                b"RSET", b"QUIT", b"MAIL FROM:<a@example.org>", b"line %d" % pick.randrange(1000),
                "Grüße, 世界".encode(), b"x" * pick.choice([76, 512, 990]), b"trailing \t ",
            ]))
        if "ended" in spice:
            lines.append(b"the end")
        sys.stdout.buffer.write(b"\n".join(lines) + b"\n\n")


def data(out):
    os.mkdir(out)
    box, maildir = mailbox.mbox(out + ".mbox"), mailbox.Maildir(out + ".maildir")
    files = sorted(glob.glob(DATA))
    for n, file in enumerate(files, 1):
        with open(file, "rb") as f:
            octets = f.read()
        with open("%s/%03d.eml" % (out, n), "wb") as f:
            f.write(octets)
        maildir.add(octets)
        # mbox.add() would put an end to the lines ending in CR LF.
        box.add(octets)
    box.close()
    assert len(files) > 40
    print(len(files))


def split(box, out):
    os.mkdir(out)
    for n, (octets, _) in enumerate(read(box), 1):
        with open("%s/%03d.eml" % (out, n), "wb") as f:
            f.write(octets)


def same(want, got):
    want = sorted(octets for octets, _ in read(want))
    got = sorted(octets if file.endswith(".eml") else octets[LISTENER.match(octets).end():]
                 for octets, file in read(got))
    for a, b in zip(want, got):
        assert a == b, "wanted:\n%r\ngot:\n%r" % (a, b)
    assert len(want) == len(got), (len(want), len(got))
    print(len(got))


def envelope(octets, content, file):
    """Sender and recipients of what a store holds, whose content is known."""
    if file.endswith(".eml"):
        assert octets == content, "not what was sent:\n%r\n%r" % (octets, content)
        with open(file[:-3] + "json", encoding="utf-8") as f:
            about = json.load(f)
        return about["from"], about["to"]
    if octets.startswith(b"X-Client-Addr"):         # smtp-sink ends a dump with an empty line
        content += b"\n"
    trace = octets[:-len(content)]
    assert octets.endswith(content) and TRACE.fullmatch(trace), (
        "not what was sent:\n%r\n%r" % (octets, content))
    return (FROM.search(trace).group(1).decode(),
            [recipient.decode() for recipient in RCPT.findall(trace)])


def check(sent, want, got):
    texts = {ID.search(octets).group(1).decode(): octets for octets, _ in read(want)}
    senders, there = {}, collections.Counter()
    for octets, file in read(got):
        key = ID.search(octets).group(1).decode()
        senders[key], recipients = envelope(octets, texts[key], file)
        there.update((key, recipient) for recipient in recipients)
    doubled = [pair for pair, n in there.items() if n > 1]

    claimed, fates, seen, wrong = set(), collections.Counter(), [], []
    with open(sent, encoding="utf-8") as f:
        for event in map(json.loads, f):
            if event["event"] == "summary":
                summary = event
            if event["event"] != "message":
                continue
            key = event["id"]
            seen.append(key)
            fates[event["fate"]] += 1
            assert senders.get(key, event["from"]) == event["from"], (key, senders[key])
            forbidden = b"\nSubject: forbidden\n" in texts[key]
            served = 0
            for to in event["to"]:
                pair = (key, to["address"])
                if to["fate"] == "delivered":
                    claimed.add(pair)
                    served += 1
                    assert to["code"] // 100 == 2, event
                # What was cut off has no verdict: it may be there or not.
                if to["fate"] in ("unknown", "unsent"):
                    if to["fate"] == "unsent" and pair in there:
                        wrong.append(event)
                    there.pop(pair, None)
                    continue
                local = to["address"].partition("@")[0]
                due = {"no": "rejected", "later": "deferred"}.get(
                    local, "rejected" if forbidden else "delivered")
                if to["fate"] != due:
                    wrong.append((due, event))
            if (event["fate"] == "delivered") != (served > 0):
                wrong.append(event)
    assert sorted(seen) == sorted(texts), "a message without its verdict, or with two"
    assert all(summary[fate] == n for fate, n in fates.items()), summary
    lost, unreported = claimed - set(there), set(there) - claimed
    amiss = {"lost": lost, "doubled": doubled, "there, but reported otherwise": unreported,
             "wrongly reported": wrong}
    with open(sent + ".counts", "w", encoding="utf-8") as f:
        print(len(seen), *(fates[f] for f in ("delivered", "rejected", "deferred")),
              fates["unknown"] + fates["unsent"], sum(map(len, amiss.values())), sep="\t", file=f)
    assert not any(amiss.values()), amiss
    print(" ".join("%d %s" % (fates[f], f) for f in (
        "delivered", "rejected", "deferred", "unknown", "unsent") if fates[f]) + ", "
        + "%d pairs" % len(claimed))


if __name__ == "__main__":
    verb, args = sys.argv[1], sys.argv[2:]
    if verb == "make":
        make(int(args[0]), args[1:])
    else:
        {"data": data, "split": split, "same": same, "check": check}[verb](*args)
