"""Rows and verdicts, the table, and the plot."""
import html
import math
import statistics


def plain(x):
    """A number as a person reads it: three digits that count."""
    if x >= 1000:
        return "{:,.0f}".format(float("%.3g" % x))
    return "%.*f" % (max(0, 2 - (math.floor(math.log10(x)) if x > 0 else 0)), x) if x < 100 else "%.0f" % x


class Row:
    """What, ours, theirs: values of the same rounds, or one each; and a target of their ratio.
    A target is (">=", 0.5) or ("<=", 2)."""

    def __init__(self, part, what, ours, theirs, unit="", target=None, note=""):
        self.part, self.what, self.unit, self.target, self.note = part, what, unit, target, note
        self.ours, self.theirs = statistics.median(ours), statistics.median(theirs)
        self.ratio = self.ours / self.theirs
        pairs = [a / b for a, b in zip(ours, theirs)]
        self.low, self.high = min(pairs + [self.ratio]), max(pairs + [self.ratio])

    @property
    def reached(self):
        if self.target is None:
            return None
        op, limit = self.target
        return self.ratio >= limit if op == ">=" else self.ratio <= limit

    @property
    def verdict(self):
        if self.reached is None:
            return ""
        if self.reached:
            return "reached"
        return "NOT REACHED by %.0f %%" % (abs(self.ratio / self.target[1] - 1) * 100)

    def cells(self):
        target = "%s %g" % self.target if self.target else ""
        return (self.what, plain(self.ours) + self.unit, plain(self.theirs) + self.unit, plain(self.ratio),
                "(%s..%s)" % (plain(self.low), plain(self.high)), target, self.verdict or self.note)

    def json(self):
        return {"part": self.part, "what": self.what, "unit": self.unit.strip(), "ours": self.ours,
                "theirs": self.theirs, "ratio": self.ratio, "min": self.low, "max": self.high,
                "target": self.target, "reached": self.reached, "note": self.note}


HEAD = ("ours against theirs", "ours", "theirs", "ratio", "(min..max)", "target", "verdict")


def table(rows):
    parts = [r.part for r in rows]
    rows = sorted(rows, key=lambda r: parts.index(r.part))
    grid = [HEAD] + [r.cells() for r in rows]
    width = [max(len(line[i]) for line in grid) for i in range(len(HEAD))]
    for n, line in enumerate(grid):
        if n > 0 and (n == 1 or rows[n - 1].part != rows[n - 2].part):
            yield "-- %s %s" % (rows[n - 1].part, "-" * (sum(width) + 9 - len(rows[n - 1].part)))
        yield "  ".join(cell.ljust(w) if i in (0, 4, 5, 6) else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(line, width))).rstrip()


def matrix(cells, names):
    """Seconds: a line for each round trip and number of messages, a column for each program."""
    def text(cell):
        if cell is None:
            return "missing"
        return plain_seconds(cell["median"]) if cell["seconds"] else "(%s)" % plain(cell["predicted"])
    width = [max(len(name), 7) + 2 for name in names]
    yield "%15s" % "RTT x messages" + "".join(name.rjust(w) for name, w in zip(names, width))
    for rtt, n in sorted({key[1:] for key in cells}):
        yield "%9s x %-4d" % ("%g ms" % rtt, n) + "".join(
            text(cells.get((name, rtt, n))).rjust(w) for name, w in zip(names, width))


def plain_seconds(x):
    return "%.3f" % x if x < 10 else "%.1f" % x


# ---- the plot ----

STYLE = """text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.page{fill:#fff}.grid{stroke:#d8dee4}.muted{fill:#59636e}.title{font-weight:600;font-size:14px}
.ours{stroke:#0969da}.ours-fill{fill:#0969da}.way{stroke:#4493d0}.way-fill{fill:#30719f}
.peer{stroke:#bc6c14}.peer-fill{fill:#9a5508}.floor{stroke:#6e7781}.floor-fill{fill:#59636e}
.bar-peer{fill:#d4904a}.bar-floor{fill:#8c959f}.line{fill:none;stroke-width:1.5}.ours.line{stroke-width:3}
.floor.line{stroke-dasharray:5 4}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.grid{stroke:#30363d}.muted{fill:#9198a1}
.ours{stroke:#4c9dff}.ours-fill{fill:#4c9dff}.way{stroke:#79b8ff}.way-fill{fill:#8ec3ff}.peer{stroke:#e3a05a}
.peer-fill{fill:#ecb47c}.floor{stroke:#9198a1}.floor-fill{fill:#9198a1}.bar-peer{fill:#b9742c}.bar-floor{fill:#6e7681}}"""


class Svg:
    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def add(self, tag, text=None, **attributes):
        said = "".join(' %s="%s"' % (k.rstrip("_").replace("_", "-"), html.escape(
            "%.1f" % v if isinstance(v, float) else str(v))) for k, v in attributes.items())
        self.parts.append("<%s%s/>" % (tag, said) if text is None else
                          "<%s%s>%s</%s>" % (tag, said, html.escape(text, quote=False), tag))

    def text(self, x, y, text, kind="", anchor="start"):
        self.add("text", text, x=float(x), y=float(y), class_=kind, text_anchor=anchor)

    def whole(self):
        return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" '
                'aria-label="bsmtp against its peers">\n<style>%s</style>\n%s\n</svg>\n') % (
                    self.width, self.height, self.width, self.height, STYLE, "\n".join(self.parts))


def spread(labels, gap, top, bottom):
    """Moves labels [y, ...] apart, so that none lies on another."""
    labels.sort(key=lambda label: label[0])
    for i, label in enumerate(labels):
        label[0] = max(label[0], top if i == 0 else labels[i - 1][0] + gap)
    for i in range(len(labels) - 1, -1, -1):
        labels[i][0] = min(labels[i][0], bottom if i == len(labels) - 1 else labels[i + 1][0] - gap)


def draw_lines(svg, cells, programs, n):
    """Seconds over the round trip, for n messages."""
    left, right, top, bottom = 62, 380, 56, 400
    seconds = {(name, rtt): cell["median"] for (name, rtt, m), cell in cells.items() if m == n and cell["seconds"]}
    rtts = sorted({rtt for _, rtt in seconds})
    low = math.floor(math.log10(min(seconds.values())))
    high = math.ceil(math.log10(max(seconds.values())))

    def x(rtt):
        return left + (right - left) * rtt / max(rtts[-1], 1)

    def y(value):
        return bottom - (bottom - top) * (math.log10(value) - low) / (high - low)
    svg.text(16, 28, "Seconds to send %d messages of 4 KiB" % n, "title")
    for power in range(low, high + 1):
        svg.add("line", x1=left, x2=right, y1=y(10.0 ** power), y2=y(10.0 ** power), class_="grid")
        svg.text(left - 8, y(10.0 ** power) + 4, "%g s" % 10.0 ** power, "muted", "end")
    for rtt in rtts:
        svg.text(x(rtt), bottom + 20, "%.3g" % rtt, "muted", "middle")
    svg.text((left + right) / 2, bottom + 40, "round trip, milliseconds", "muted", "middle")
    labels = []
    for name, label, kind in programs:
        points = [(x(rtt), y(seconds[name, rtt])) for rtt in rtts if (name, rtt) in seconds]
        if points:
            svg.add("polyline", points=" ".join("%.1f,%.1f" % p for p in points), class_=kind + " line")
            for px, py in points:
                svg.add("circle", cx=px, cy=py, r="2.5", class_=kind + "-fill")
            labels.append([points[-1][1], points[-1], label, kind])
    spread(labels, 15, top, bottom)
    for at, (px, py), name, kind in labels:
        svg.add("line", x1=px + 4, y1=py, x2=right + 14, y2=at, class_=kind, stroke_width="0.6")
        svg.text(right + 18, at + 4, name, kind + "-fill")


def draw_bars(svg, top, title, bars):
    """bars: (name, messages a second, kind); ours is the first, and 1.00."""
    left, width = 668, 170
    most = max(rate for _, rate, _ in bars)
    svg.text(520, top, title, "title")
    for i, (name, rate, kind) in enumerate(bars):
        at = top + 14 + 24 * i
        svg.text(left - 8, at + 13, name, kind + "-fill", "end")
        svg.add("rect", x=left, y=at, width=max(1.0, width * rate / most), height=18, rx=2,
                class_="ours-fill" if kind == "ours" else "bar-" + kind)
        times = "" if i == 0 else ", %s ×" % plain(rate / bars[0][1]) if rate > bars[0][1] else \
            ", 1/%s" % plain(bars[0][1] / rate)
        svg.text(left + max(1.0, width * rate / most) + 6, at + 13, "%s/s%s" % (plain(rate), times), "muted")


def plot(path, cells, programs, n, groups):
    svg = Svg(980, 460)
    svg.add("rect", width=svg.width, height=svg.height, class_="page")
    if any(m == n and cell["seconds"] for (_, _, m), cell in cells.items()):
        draw_lines(svg, cells, programs, n)
    top = 28
    for title, bars in groups:
        if bars:
            draw_bars(svg, top, title, bars)
            top += 60 + 24 * len(bars)
    with open(path, "w", encoding="utf-8") as f:
        f.write(svg.whole())
