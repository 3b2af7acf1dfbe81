# bsmtp: build, test, install.  POSIX make; every variable may be overridden.
.POSIX:

CC = cc
CFLAGS = -O3 -g
WARN = -std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes \
	-Wwrite-strings -Wcast-qual -Wformat=2 -Wundef -Wvla -Wconversion
LIBS = -lssl -lcrypto -lpthread
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
MANDIR = $(PREFIX)/share/man
BASHDIR = $(PREFIX)/share/bash-completion/completions
ZSHDIR = $(PREFIX)/share/zsh/site-functions
FISHDIR = $(PREFIX)/share/fish/vendor_completions.d
PROGRAM = bsmtp
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all

all: bsmtp

bsmtp: bsmtp.c bsmtp.h
	$(CC) $(WARN) $(CFLAGS) $(LDFLAGS) -o $@ bsmtp.c $(LIBS)

build:
	mkdir -p build

build/bsmtp-asan: bsmtp.c bsmtp.h | build
	$(CC) $(WARN) -O1 -g $(SANITIZE) -o $@ bsmtp.c $(LIBS)

build/bsmtp-torture: bsmtp.c bsmtp.h | build
	$(CC) $(WARN) -O1 -g $(SANITIZE) -DBSMTP_TORTURE -o $@ bsmtp.c $(LIBS)

build/unit: bsmtp.c bsmtp.h tests/unit.c | build
	$(CC) $(WARN) -O1 -g $(SANITIZE) -DBSMTP_NO_MAIN -I. -o $@ bsmtp.c tests/unit.c

# All tests: the units, then the suite with the plain, the sanitized and the
# torture build.
check: bsmtp build/unit build/bsmtp-asan build/bsmtp-torture
	tests/run

bench: bsmtp
	tests/bench/bench

bench-quick: bsmtp
	tests/bench/bench quick

fuzz:
	tests/fuzz/run.sh $${FUZZ_SECONDS:-60}

lint:
	tests/lint

demo: bsmtp
	tests/demo

install: bsmtp
	mkdir -p $(DESTDIR)$(BINDIR) $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man3 \
		$(DESTDIR)$(MANDIR)/man7 $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR)
	cp bsmtp $(DESTDIR)$(BINDIR)/$(PROGRAM)
	chmod 755 $(DESTDIR)$(BINDIR)/$(PROGRAM)
	for n in 1 3 7; do \
		cp man/bsmtp.$$n $(DESTDIR)$(MANDIR)/man$$n/$(PROGRAM).$$n && \
		chmod 644 $(DESTDIR)$(MANDIR)/man$$n/$(PROGRAM).$$n || exit 1; done
	./bsmtp completion bash $(PROGRAM) >$(DESTDIR)$(BASHDIR)/$(PROGRAM)
	./bsmtp completion zsh $(PROGRAM) >$(DESTDIR)$(ZSHDIR)/_$(PROGRAM)
	./bsmtp completion fish $(PROGRAM) >$(DESTDIR)$(FISHDIR)/$(PROGRAM).fish

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/$(PROGRAM) $(DESTDIR)$(BASHDIR)/$(PROGRAM) \
		$(DESTDIR)$(ZSHDIR)/_$(PROGRAM) $(DESTDIR)$(FISHDIR)/$(PROGRAM).fish
	for n in 1 3 7; do rm -f $(DESTDIR)$(MANDIR)/man$$n/$(PROGRAM).$$n; done

clean:
	rm -rf bsmtp build

dist:
	v=$$(sed -n 's/.*BSMTP_VERSION "\(.*\)"/\1/p' bsmtp.h) && \
	git archive --prefix=bsmtp-$$v/ -o bsmtp-$$v.tar.gz HEAD

.PHONY: all check bench bench-quick fuzz lint demo install uninstall clean dist
