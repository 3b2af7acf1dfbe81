"""Where the benchmark's programs run: hosts, servers, and what they used up."""
import concurrent.futures
import contextlib
import itertools
import os
import pwd
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import corpus

HELO = "client.example.org"
serial = itertools.count()


class Malfunction(Exception):
    """Something did not do what it should: the benchmark fails."""


class Missing(Exception):
    """A tool that cannot be had: the rest is measured without it."""


VARIES = tuple((re.compile(pattern), name) for pattern, name in (
    (re.escape(sys.executable), "python3"), (r"(\d+\.\d+\.\d+\.\d+|\[\S+\]):\d+", "HOST:PORT"),
    (r" --address-file ADDRESS-\d+", ""), (r" ADDRESS-\d+", " FILE"), (r"--count \d+", "--count N"),
    (r"-m \d+", "-m N"), (r"-s \d+ ", "-s SESSIONS "), (r"-l \d+", "-l SIZE"), (r"store-\d+", "PLACE"),
    (r"stream-\d+", "stream-SIZE"), (r"peer\d+\.example", "NAME"), (r"--latency \d+ms", "--latency RTT"),
    (r"receive -d \d+ (\S+) \S+", r"receive -d RTT \1 HOST"),
    (r"(floor connect|floor-tls send -t|floor send|floor idle|send\.py) \S+ \d+", r"\1 HOST PORT"),
    (r"(send HOST PORT|send -t HOST PORT) \d+", r"\1 OCTETS"), (r"(send\.py HOST PORT|PLACE|seq|idle HOST PORT|max-connections) \d+", r"\1 N"),
    (r"\b\d+\.(mbox|curl)", r"N.\1"), (r"repeat \d+", "repeat MIB"), (r"(--host[= ]|--server )\S+", r"\1HOST"),
    (r"(--port[= ])\d+", r"\1PORT"), (r"files PLACE N \d+", "files PLACE N GROUP")))


def shown(command):
    """A command without what differs from run to run."""
    for pattern, name in VARIES:
        command = pattern.sub(name, command)
    return command


class Usage:
    """What "floor time" said of a program, and what that printed itself."""

    def __init__(self, out, err):
        head, _, tail = out.rstrip("\n").rpartition("\n")
        fields = tail.split()
        if len(fields) != 6 or fields[0] != "usage":
            raise Malfunction("no usage was told: " + (out + err).strip()[-500:])
        self.out, self.err = head, err.strip()
        self.seconds = float(fields[1])
        self.cpu = float(fields[2]) + float(fields[3])
        self.kib = int(fields[4]) // (1024 if sys.platform == "darwin" else 1)
        self.status = int(fields[5])


class Host:
    """This machine, or one behind a prefix that takes a script for sh on standard input."""

    def __init__(self, prefix=""):
        self.prefix, self.dir = shlex.split(prefix), None
        self.tools = {}

    def popen(self, script):
        env = "cd %s && export PATH=%s/bin:$PATH:/usr/sbin TMPDIR=%s\n" % ((shlex.quote(self.dir),) * 3)
        p = subprocess.Popen(self.prefix + ["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, start_new_session=True)
        p.stdin.write(((env if self.dir else "") + script + "\n").encode())
        p.stdin.flush()
        return p

    def sh(self, script, timeout=60):
        p = self.popen(script)
        try:
            out, err = p.communicate(timeout=timeout)
        except BaseException as e:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
            if isinstance(e, subprocess.TimeoutExpired):
                raise Malfunction("took over %d s: %s" % (timeout, script)) from None
            raise
        return p.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    def run(self, command, feed="", status=0, timeout=300):
        """Runs `FEED | COMMAND`, the command timed; one that fails is a malfunction."""
        usage = Usage(*self.sh("%s floor time %s" % (feed and feed + " |", command), timeout)[1:])
        if usage.status != status:
            raise Malfunction("exit status %d of %s\n%s" % (usage.status, command, usage.err[-500:]))
        return usage

    def need(self, tool):
        if tool not in self.tools:
            self.tools[tool] = self.sh("command -v " + tool)[0] == 0
        if not self.tools[tool]:
            raise Missing(tool)

    def settle(self, local_dir):
        """Takes the files of a local folder, and works in them from then on."""
        if not self.prefix:
            self.dir = str(local_dir)
            return
        tar = subprocess.run(["tar", "chf", "-", "-C", str(local_dir), "."], stdout=subprocess.PIPE, check=True)
        coded = subprocess.run(["base64"], input=tar.stdout, stdout=subprocess.PIPE, check=True)
        status, out, err = self.sh("d=$(mktemp -d) && cd $d && base64 -d >t <<'end' && tar xf t && echo $d\n%send"
                                   % coded.stdout.decode())
        if status != 0:
            raise Malfunction("cannot reach %s: %s" % (shlex.join(self.prefix), err))
        self.dir = out.strip()

    def leave(self):
        if self.prefix and self.dir:
            self.sh("cd / && rm -rf " + shlex.quote(self.dir))


class Others:
    """What share of the CPUs went elsewhere, since it was made: a busy machine's figures
    are worth less.  None where the system does not tell."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        try:
            with open("/proc/stat", encoding="ascii") as f:
                user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
        except OSError:
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4]), time.monotonic() * os.cpu_count()

    def share(self):
        end = self.now()
        return end and max(0, (end[0] - self.start[0]) / (end[1] - self.start[1]))


class Server:
    """A program that ends by itself, or when its standard input does."""

    def __init__(self, host, command, address=None):
        self.host, self.command, self.usage = host, command, None
        self.process = host.popen("exec floor time -k " + command)
        self.address = address or self.await_address(command)

    def await_address(self, command):
        file = command.split("ADDRESS-", 1)[1].split()[0]
        status, out, _ = self.host.sh("for i in $(seq 500); do [ -s ADDRESS-%s ] && break; sleep 0.02; done\n"
                                      "cat ADDRESS-%s" % (file, file))
        if status != 0:
            self.stop()
            raise Malfunction("never ready: %s\n%s" % (command, self.usage.err))
        return out.split()[0]

    def shown(self, command):
        return shown("%s & %s" % (self.command.replace(self.host.dir + "/", ""), command))

    @property
    def host_port(self):
        host, port = self.address.rsplit(":", 1)
        return host.strip("[]"), port

    def ended(self, timeout):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self):
        if self.usage is None:
            out, err = self.process.communicate()           # the end of its input is a signal
            self.usage = Usage(out.decode(errors="replace"), err.decode(errors="replace"))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.stop()


def silent(command):
    return "sh -c 'exec %s >/dev/null 2>&1'" % command


class Listener(Server):
    """bsmtp listen, which ends when it has taken just so many messages."""

    def __init__(self, host, options, count, bind="127.0.0.1", wrap=str):
        self.count = count
        super().__init__(host, wrap("bsmtp listen %s --count %d --address-file ADDRESS-%d %s:0" % (
            options, count, next(serial), bind)))

    def __exit__(self, kind, value, trace):
        done = kind is not None or self.ended(20)
        self.stop()
        if kind is None and (not done or self.usage.status != 0 or self.usage.err):
            raise Malfunction("the listener did not take %d messages and end: %s\n%s" % (
                self.count, self.command, self.usage.err))


class Receiver(Server):
    """The other end of a raw connection; it prints the octets that came."""

    def __init__(self, host, delay=0, bind="127.0.0.1", cert=None):
        how = "floor-tls receive -t " + cert if cert else "floor receive -d %d" % delay
        super().__init__(host, "%s ADDRESS-%d %s" % (how, next(serial), bind))

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.ended(20)
        self.stop()
        if kind is None and self.usage.status != 0:
            raise Malfunction("the receiver failed: " + self.usage.err)


# ---- servers of others: they take no port 0, so one that was free is tried ----

def greets(port, name):
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as s:
            return s.recv(512).startswith(b"220 " + name.encode())
    except OSError:
        return False


def serve(host, start):
    """start(port, name) is a command; tried until what greets us is that."""
    for _ in range(20):
        port, name = random.randrange(10000, 32000), "peer%d.example" % next(serial)
        server = Server(host, start(port, name), "127.0.0.1:%d" % port)
        for _ in range(500):
            if greets(port, name):
                return server
            if server.ended(0.02):
                break
        server.stop()
    raise Malfunction("does not start: %s\n%s" % (server.command, server.usage.err))


def smtp_sink(host, store=None):
    host.need("smtp-sink")
    user = "-u root " if os.getuid() == 0 else ""
    return serve(host, lambda port, name: "smtp-sink %s%s-h %s 127.0.0.1:%d 1000" % (
        user, "-d %s/ " % store if store else "", name, port))


def smtp_source(address, count, sessions, size):
    return "smtp-source -d -s %s -m %s -l %s -M %s -f %s -t %s %s" % (
        sessions, count, size, HELO, corpus.SENDER, corpus.RECIPIENT, address)


SMTPLIB = r"""import smtplib, sys
host, port, count, file = sys.argv[1:]
with open(file, "rb") as f:
    message = f.read().replace(b"\n", b"\r\n")
with smtplib.SMTP(host, int(port), local_hostname="client.example.org") as s:
    for _ in range(int(count)):
        s.sendmail("a@example.org", ["b@example.net"], message, ["BODY=8BITMIME"])
"""

AIOSMTPD = """import asyncio, os, sys
from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP
async def main():
    handler = Mailbox(sys.argv[2])
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(handler, hostname="peer.example"), "127.0.0.1", 0)
    with open(sys.argv[1] + ".new", "w") as f:
        f.write("127.0.0.1:%d" % server.sockets[0].getsockname()[1])
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    await server.serve_forever()
asyncio.run(main())
"""


def aiosmtpd(host, store):
    for python in (sys.executable, "/usr/bin/python3"):
        if host.sh("%s -c 'import aiosmtpd'" % python)[0] == 0:
            return Server(host, "%s aiosmtpd-mailbox.py ADDRESS-%d %s" % (python, next(serial), store))
    raise Missing("aiosmtpd")


MAIN_CF = """compatibility_level = 3.6
myhostname = {name}
queue_directory = {dir}/spool
data_directory = {dir}/data
maillog_file = {dir}/log
maillog_file_prefixes = {dir}
inet_interfaces = 127.0.0.1
mydestination =
alias_maps =
local_header_rewrite_clients =
in_flow_delay = 0
virtual_mailbox_domains = example.net
virtual_mailbox_base = {dir}/mail
virtual_mailbox_maps = inline:{{ b@example.net=b/ }}
virtual_minimum_uid = 1
virtual_uid_maps = static:{mail.pw_uid}
virtual_gid_maps = static:{mail.pw_gid}
smtpd_relay_restrictions = reject_unauth_destination
"""
MASTER_CF = """127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""
SPOOL = """mkdir -p data mail etc spool && cd spool && mkdir -p pid active bounce corrupt defer deferred \\
    flush hold incoming private maildrop public saved trace &&
chown postfix ../data [!p]* private public && chown mail ../mail && chgrp postdrop maildrop public &&
chmod 730 maildrop && chmod 710 public"""


def postfix(host, store):
    """A private instance, whose Maildir is STORE/mail/b."""
    host.need("postconf")
    if os.getuid() != 0:
        raise Missing("root, for a private Postfix")
    status, out, err = host.sh("postconf -dh daemon_directory && mkdir %s && cd %s && %s" % (store, store, SPOOL))
    if status != 0:
        raise Missing("a private Postfix (%s)" % err.strip())
    where = os.path.join(host.dir, store)

    def start(port, name):
        fill = {"dir": where, "name": name, "port": port, "mail": pwd.getpwnam("mail")}
        for file, text in (("main.cf", MAIN_CF), ("master.cf", MASTER_CF)):
            with open(os.path.join(where, "etc", file), "w", encoding="ascii") as f:
                f.write(text.format(**fill))
            os.utime(f.name, (time.time() - 60,) * 2)       # it waits while that is new
        return "%s/master -s -c %s/etc" % (out.strip(), where)
    return serve(host, start)


def make_certificate(path):
    """A certificate of 127.0.0.1 by itself, and its key."""
    if shutil.which("openssl") is None:
        raise Missing("openssl")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
                    path + ".key", "-out", path, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
                   check=True, stderr=subprocess.DEVNULL)
    with open(path, "ab") as whole, open(path + ".key", "rb") as key:
        whole.write(key.read())


def remove(place):
    """Side by side, for a disk that is told what is free makes each file wait."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for path, _, names in os.walk(place):
            for name in names:
                pool.submit(os.unlink, os.path.join(path, name))
    shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def workplace(build, bsmtp, floor_c):
    """A folder below build/ with the programs in bin, gone at the end and not before."""
    os.makedirs(build, exist_ok=True)
    place = os.path.join(build, "bench.%d" % os.getpid())
    os.makedirs(place + "/bin")
    try:
        for name, flags in (("floor", []), ("floor-tls", ["-DWITH_TLS", "-lssl", "-lcrypto"])):
            subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", "%s/bin/%s" % (place, name), floor_c, *flags], check=True)
        shutil.copy(bsmtp, place + "/bin/bsmtp")
        for name, text in (("aiosmtpd-mailbox.py", AIOSMTPD), ("smtplib-send.py", SMTPLIB)):
            with open(os.path.join(place, name), "w", encoding="ascii") as f:
                f.write(text)
        yield place
    finally:
        remove(place)
