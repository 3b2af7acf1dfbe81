/* SPDX-License-Identifier: ISC
 *
 * bsmtp - batch SMTP in one stream: a client that fires mail without waiting,
 * and a listener that stores it.
 *
 * Copyright (c) 2026 the bsmtp authors.  See LICENSE.
 *
 * Map
 *	 1 platform		feature macros, includes, shims
 *	 2 bytes		slices, classes, numbers, text under construction
 *	 3 grammar		replies, commands, paths, parameters; headers, mbox
 *	 4 body codecs		line ends, dots, watching for bare newlines
 *	 5 client engine	the modes table, the queue of replies due, fates
 *	 6 server engine	one row a verb, one row an answer; held replies
 *	 7 names		modes, fates, keywords, errors as words
 *	---- the wall: above, no operating system; below, all of it ----
 *	 8 link			addresses, sockets; all of OpenSSL: TLS, hashes
 *	 9 sources		files, pipes, Maildirs as streams of messages
 *	10 stores		one row a store; the journal and ids; commands; workers
 *	11 watchers		diagnostics, trace, JSON
 *	12 send			source -> client engine -> link
 *	13 listen		accept, sessions, accounts, limits, signals, latency
 *	14 options		one table: usage, environment, completion; sendmail's
 *	15 main
 *
 * Data flow
 *	send	file pages -> message ends, LF to CRLF, frame -> one buffer -> socket
 *		socket -> replies, matched by counting -> fates -> status, JSON
 *	listen	socket -> commands | body slices -> store (tmp) -> committer
 *		committed -> the replies that were held -> socket
 *
 * Invariants
 *	- No message is called delivered without its own 2yz.
 *	- No 2yz leaves before the message is on stable storage.
 *	- A body is never read as commands, whatever was refused before it.
 *	- Both ends read while they write; memory does not grow with the input.
 *	- What a peer or a file says is bounded, and never printed raw, nor used
 *	  in a file name.
 *
 * Build switches
 *	BSMTP_NO_MAIN	the engines alone, a library (bsmtp.h, bsmtp(3))
 *	BSMTP_NO_TLS	without OpenSSL
 *	BSMTP_TORTURE	one octet a read or write, the smallest buffers
 */

/* ==== 1 platform ========================================================= */

#ifndef BSMTP_NO_MAIN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1           /* syncfs(); on other systems without effect */
#endif
#ifdef __APPLE__
#define _DARWIN_C_SOURCE 1
#endif
#define _FILE_OFFSET_BITS 64
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/utsname.h>
#include <sys/vfs.h>
#endif
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sysexits.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#ifndef BSMTP_NO_TLS
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#endif
#endif
#if defined(__SSE2__) && !defined(BSMTP_TORTURE)
#include <emmintrin.h>
#define WITH_SSE2               /* the torture build tests the portable path */
#endif
#include <string.h>

#include "bsmtp.h"

#ifdef BSMTP_TORTURE
enum { IO_MAX = 1, OUT_SIZE = BSMTP_CLIENT_OUT_MIN, DUE_SIZE = BSMTP_CLIENT_DUE_MIN,
	HELD_SIZE = BSMTP_SERVER_HELD_MIN, WINDOW_SIZE = 2 * BSMTP_COMMAND_MAX,
	IN_SIZE = 1, REPLY_SIZE = BSMTP_SERVER_OUT_MIN, COPY_SIZE = 16 };
#else
enum { IO_MAX = 1 << 30, OUT_SIZE = 256 << 10, DUE_SIZE = 64 << 10,
	HELD_SIZE = 4096, WINDOW_SIZE = 256 << 10,
	IN_SIZE = 128 << 10, REPLY_SIZE = 32 << 10, COPY_SIZE = 64 << 10 };
#endif

#if defined(__GNUC__)
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#else
#define PRINTF_LIKE(f, a)
#endif

/* ==== 2 bytes ============================================================ */

#define COUNT(table) (sizeof(table) / sizeof(table)[0])

static bool is_digit(char c) { return c >= '0' && c <= '9'; }
static bool is_alpha(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
static bool is_alnum(char c) { return is_digit(c) || is_alpha(c); }
static bool is_8bit(char c) { return (unsigned char)c > 127; }
static bool is_blank(char c) { return c == ' ' || c == '\t'; }
static bool is_space(char c) { return is_blank(c) || c == '\r' || c == '\n'; }
static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c; }
static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

static bool is_hex(char c)
{
	return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'f');
}

/* atext of RFC 5322 3.2.3. */
static bool is_atext(char c)
{
	return is_alnum(c) || (c != '\0' && strchr("!#$%&'*+-/=?^_`{|}~", c) != NULL);
}

static struct bsmtp_slice slice(const char *at, size_t len)
{
	return (struct bsmtp_slice){ at, len };
}

static struct bsmtp_slice slice_of(const char *text)
{
	return slice(text, strlen(text));
}

static bool same(struct bsmtp_slice s, const char *word)
{
	size_t i = 0;

	while (i < s.len && word[i] != '\0' && lower(s.at[i]) == lower(word[i]))
		i++;
	return i == s.len && word[i] == '\0';
}

static struct bsmtp_slice trim(struct bsmtp_slice s)
{
	while (s.len > 0 && is_space(s.at[0]))
		s = slice(s.at + 1, s.len - 1);
	while (s.len > 0 && is_space(s.at[s.len - 1]))
		s.len--;
	return s;
}

/* Text under construction in memory of fixed size; what does not fit is cut,
 * and every caller has room for what it writes. */
struct text {
	char *at;
	size_t len, cap;
};

static void put(struct text *t, struct bsmtp_slice s)
{
	size_t n = min_size(s.len, t->cap - t->len);

	if (n > 0)
		memcpy(t->at + t->len, s.at, n);
	t->len += n;
}

static void put_string(struct text *t, const char *s)
{
	put(t, slice_of(s));
}

static void put_number(struct text *t, uint64_t n)
{
	char digits[20];
	size_t i = sizeof digits;

	do {
		digits[--i] = (char)('0' + n % 10);
		n /= 10;
	} while (n > 0);
	put(t, slice(digits + i, sizeof digits - i));
}

ptrdiff_t bsmtp_number_parse(uint64_t *number, const char *in, size_t len)
{
	uint64_t n = 0;
	size_t i;

	for (i = 0; i < len && is_digit(in[i]); i++) {
		unsigned digit = (unsigned)(in[i] - '0');
		if (i == 20 || n > (UINT64_MAX - digit) / 10)
			return BSMTP_BAD;
		n = n * 10 + digit;
	}
	if (i == 0)
		return len == 0 ? BSMTP_MORE : BSMTP_BAD;
	*number = n;
	return (ptrdiff_t)i;
}

bool bsmtp_has_8bit(struct bsmtp_slice text)
{
	uint64_t eight;         /* octets at once, for every header comes this way */
	size_t i = 0;

	for (; text.len - i >= sizeof eight; i += sizeof eight) {
		memcpy(&eight, text.at + i, sizeof eight);
		if ((eight & 0x8080808080808080U) != 0)
			return true;
	}
	while (i < text.len && !is_8bit(text.at[i]))
		i++;
	return i < text.len;
}

/* The octets of the UTF-8 sequence at the head of s, 0 if it is none: no
 * overlong forms, no surrogates, nothing over U+10FFFF (RFC 3629 4). */
static size_t utf8_sequence(struct bsmtp_slice s)
{
	unsigned char c = (unsigned char)s.at[0], low = 0x80, high = 0xBF;
	size_t n = c < 0x80 ? 1 : c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 :
	    c >= 0xF0 && c <= 0xF4 ? 4 : 0;

	if (n == 0 || n > s.len)
		return 0;
	if (c == 0xE0)
		low = 0xA0;
	else if (c == 0xED)
		high = 0x9F;
	else if (c == 0xF0)
		low = 0x90;
	else if (c == 0xF4)
		high = 0x8F;
	for (size_t i = 1; i < n; i++, low = 0x80, high = 0xBF)
		if ((unsigned char)s.at[i] < low || (unsigned char)s.at[i] > high)
			return 0;
	return n;
}

bool bsmtp_utf8_valid(struct bsmtp_slice text)
{
	while (text.len > 0) {
		size_t n = utf8_sequence(text);
		if (n == 0)
			return false;
		text = slice(text.at + n, text.len - n);
	}
	return true;
}

/* RFC 4648 4. */
static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void put_base64(struct text *t, struct bsmtp_slice s)
{
	for (size_t i = 0; i < s.len; i += 3) {
		unsigned n = (unsigned)(unsigned char)s.at[i] << 16;
		char four[4] = { '=', '=', '=', '=' };
		n |= i + 1 < s.len ? (unsigned)(unsigned char)s.at[i + 1] << 8 : 0;
		n |= i + 2 < s.len ? (unsigned)(unsigned char)s.at[i + 2] : 0;
		for (size_t k = 0; k < 4 && (k < 2 || i + k - 1 < s.len); k++)
			four[k] = base64_digits[n >> (18 - 6 * k) & 63];
		put(t, slice(four, 4));
	}
}

/* Decodes to t; false where it is no base64, or does not fit. */
static bool take_base64(struct text *t, struct bsmtp_slice s)
{
	size_t pad = 0;

	while (pad < 2 && s.len > pad && s.at[s.len - pad - 1] == '=')
		pad++;
	if (s.len % 4 != 0 || t->cap - t->len < s.len / 4 * 3)
		return false;
	for (size_t i = 0; i < s.len; i += 4) {
		unsigned n = 0;
		for (size_t k = 0; k < 4; k++) {
			const char *digit = i + k < s.len - pad && s.at[i + k] != '\0' ?
			    strchr(base64_digits, s.at[i + k]) : i + k < s.len - pad ? NULL : base64_digits;
			if (digit == NULL)
				return false;
			n = n << 6 | (unsigned)(digit - base64_digits);
		}
		for (size_t k = 0; k < 3; k++)
			t->at[t->len++] = (char)(n >> (16 - 8 * k) & 255);
	}
	t->len -= pad;
	return true;
}

/* ==== 3 grammar ========================================================== */

/* ---- replies, RFC 5321 4.2 ---- */

/* class "." subject "." detail, RFC 2034 4, of the same class as the code. */
static size_t status_length(struct bsmtp_slice text, char class)
{
	size_t i = 1;

	if (text.len < 5 || text.at[0] != class)
		return 0;
	for (int part = 0; part < 2; part++) {
		size_t start = ++i;
		if (text.at[i - 1] != '.')
			return 0;
		while (i < text.len && i < start + 3 && is_digit(text.at[i]))
			i++;
		if (i == start || (part == 0 && i >= text.len))
			return 0;
	}
	return i == text.len || text.at[i] == ' ' ? i : 0;
}

ptrdiff_t bsmtp_reply_line_parse(struct bsmtp_reply_line *line, const char *in, size_t len)
{
	size_t window = min_size(len, BSMTP_REPLY_LINE_MAX), n, status;
	const char *end = window > 0 ? memchr(in, '\n', window) : NULL;

	for (size_t i = 0; i < window && i < 3; i++)
		if (!is_digit(in[i]) || (i == 0 && (in[0] < '1' || in[0] > '5')))
			return BSMTP_BAD;
	if (window > 3 && strchr(" -\r", in[3]) == NULL)
		return BSMTP_BAD;
	n = end != NULL ? (size_t)(end - in) : window;
	if (end == NULL)
		return window < BSMTP_REPLY_LINE_MAX ? BSMTP_MORE : BSMTP_BAD;
	if (n < 4 || in[n - 1] != '\r' || memchr(in, '\r', n - 1) != NULL ||
	    memchr(in, '\0', n) != NULL)
		return BSMTP_BAD;
	line->code = (in[0] - '0') * 100 + (in[1] - '0') * 10 + (in[2] - '0');
	line->more = in[3] == '-';
	line->text = n > 5 ? slice(in + 4, n - 5) : slice(in + n - 1, 0);
	status = status_length(line->text, in[0]);
	line->status = slice(line->text.at, status);
	line->text = trim(slice(line->text.at + status, line->text.len - status));
	return (ptrdiff_t)n + 1;
}

/* ---- domains, mailboxes, paths, RFC 5321 4.1.2 and 4.1.3 ---- */

/* sub-domain *("." sub-domain): letters, digits, inner hyphens. */
static bool is_domain_name(struct bsmtp_slice s, bool utf8)
{
	size_t label = 0;
	bool ascii = true;

	if (s.len == 0 || s.len > BSMTP_DOMAIN_MAX)
		return false;
	for (size_t i = 0; i < s.len; i++) {
		char c = s.at[i];
		bool inner = c == '-' && label > 0;
		ascii = c != '.' ? ascii && !is_8bit(c) : true;
		if (c == '.' && label > 0 && s.at[i - 1] != '-')
			label = 0;
		else if (is_alnum(c) || inner || (utf8 && is_8bit(c)))
			label++;
		else
			return false;
		if (label > 63 && ascii)        /* a U-label's limit is that of its A-label */
			return false;
	}
	return label > 0 && s.at[s.len - 1] != '-' && (!utf8 || bsmtp_utf8_valid(s));
}

static bool is_ipv4(struct bsmtp_slice s)
{
	for (int part = 0; part < 4; part++) {
		uint64_t n;
		ptrdiff_t used = bsmtp_number_parse(&n, s.at, min_size(s.len, 3));
		if (used <= 0 || n > 255)
			return false;
		s = slice(s.at + used, s.len - (size_t)used);
		if (part == 3)
			return s.len == 0;
		if (s.len == 0 || s.at[0] != '.')
			return false;
		s = slice(s.at + 1, s.len - 1);
	}
	return false;
}

/* IPv6-full, IPv6-comp, and both with a dotted quad at the end. */
static bool is_ipv6(struct bsmtp_slice s)
{
	unsigned groups = 0;
	bool gap = false;
	size_t i = 0;

	if (s.len >= 2 && s.at[0] == ':' && s.at[1] == ':') {
		gap = true;
		i = 2;
	}
	while (i < s.len) {
		size_t start = i;
		while (i < s.len && is_hex(s.at[i]))
			i++;
		if (i < s.len && s.at[i] == '.') {
			groups += 2;
			return groups <= 8 && (gap ? groups < 7 : groups == 8) &&
			    is_ipv4(slice(s.at + start, s.len - start));
		}
		if (i == start || i - start > 4 || ++groups > 8)
			return false;
		if (i == s.len)
			break;
		if (s.at[i++] != ':' || i == s.len)
			return false;
		if (s.at[i] == ':') {
			if (gap)
				return false;
			gap = true;
			i++;
		}
	}
	return gap ? groups < 7 : groups == 8;
}

/* "[" IPv4 / "IPv6:" IPv6 / Standardized-tag ":" 1*dcontent "]". */
static bool is_address_literal(struct bsmtp_slice s)
{
	size_t tag = 0;

	if (s.len < 3 || s.len > BSMTP_DOMAIN_MAX || s.at[0] != '[' || s.at[s.len - 1] != ']')
		return false;
	s = slice(s.at + 1, s.len - 2);
	if (is_ipv4(s))
		return true;
	if (s.len > 5 && same(slice(s.at, 5), "IPv6:"))
		return is_ipv6(slice(s.at + 5, s.len - 5));
	while (tag < s.len && (is_alnum(s.at[tag]) || s.at[tag] == '-'))
		tag++;
	if (tag == 0 || s.at[tag - 1] == '-' || tag + 1 >= s.len || s.at[tag] != ':')
		return false;
	for (size_t i = tag + 1; i < s.len; i++)
		if (s.at[i] < '!' || s.at[i] > '~' || strchr("[\\]<>\"", s.at[i]) != NULL)
			return false;
	return true;
}

bool bsmtp_domain_valid(struct bsmtp_slice domain, bool utf8)
{
	return is_domain_name(domain, utf8) || is_address_literal(domain);
}

/* Dot-string / Quoted-string at the head of s: its octets, 0 if it is none. */
static size_t local_part_length(struct bsmtp_slice s, bool utf8)
{
	size_t i = 0;

	if (s.len > 0 && s.at[0] == '"') {
		for (i = 1; i < s.len && s.at[i] != '"'; i++) {
			if (s.at[i] == '\\' && ++i == s.len)
				return 0;
			if ((s.at[i] < ' ' || s.at[i] > '~') && !(utf8 && is_8bit(s.at[i])))
				return 0;
		}
		return i < s.len ? i + 1 : 0;
	}
	while (i < s.len && (is_atext(s.at[i]) || (utf8 && is_8bit(s.at[i])) ||
	    (s.at[i] == '.' && i > 0 && s.at[i - 1] != '.')))
		i++;
	return i > 0 && s.at[i - 1] == '.' ? 0 : i;
}

bool bsmtp_mailbox_valid(struct bsmtp_slice mailbox, bool utf8)
{
	size_t local = local_part_length(mailbox, utf8);

	/* RFC 5321 4.5.3.1.1 allows a local-part 64 octets; longer ones are in
	 * use (VERP), so only the whole is bounded. */
	return local > 0 && mailbox.len <= BSMTP_MAILBOX_MAX && local + 1 < mailbox.len &&
	    mailbox.at[local] == '@' &&
	    bsmtp_domain_valid(slice(mailbox.at + local + 1, mailbox.len - local - 1), utf8) &&
	    (!utf8 || bsmtp_utf8_valid(mailbox));
}

bool bsmtp_transid_valid(struct bsmtp_slice id)
{
	const char *at = id.len > 2 ? memchr(id.at, '@', id.len) : NULL;
	size_t local, domain;

	if (at == NULL || id.len > BSMTP_TRANSID_MAX || id.at[0] != '<' || id.at[1] == '"' ||
	    at[1] == '"' || id.at[id.len - 1] != '>')
		return false;
	for (size_t i = 0; i < id.len; i++)
		if (memchr("/?=", id.at[i], 3) != NULL)
			return false;
	local = (size_t)(at - id.at) - 1;
	domain = id.len - local - 3;
	return local > 0 && domain > 0 && local_part_length(slice(id.at + 1, local), false) == local &&
	    local_part_length(slice(at + 1, domain), false) == domain;
}

/* The ">" that closes a path: one inside a quoted string does not. */
static size_t path_end(struct bsmtp_slice s)
{
	bool quoted = false;
	size_t i;

	for (i = 0; i < s.len; i++) {
		if (s.at[i] == '"')
			quoted = !quoted;
		else if (quoted && s.at[i] == '\\')
			i++;
		else if (!quoted && s.at[i] == '>')
			break;
	}
	return i < s.len ? i : s.len;
}

/* A-d-l ":", the source route: its octets, 0 if there is none, or BSMTP_BAD. */
static ptrdiff_t route_length(struct bsmtp_slice s, bool utf8)
{
	size_t start = 1;

	if (s.len == 0 || s.at[0] != '@')
		return 0;
	for (size_t i = 1; i < s.len; i++) {
		if (s.at[i] != ',' && s.at[i] != ':')
			continue;
		if (!is_domain_name(slice(s.at + start, i - start), utf8))
			return BSMTP_BAD;
		if (s.at[i] == ':')
			return (ptrdiff_t)i + 1;
		if (i + 1 == s.len || s.at[i + 1] != '@')
			return BSMTP_BAD;
		start = i + 2;
	}
	return BSMTP_BAD;
}

ptrdiff_t bsmtp_path_parse(struct bsmtp_slice *mailbox, const char *in, size_t len, unsigned flags)
{
	bool utf8 = (flags & BSMTP_PATH_UTF8) != 0;
	struct bsmtp_slice s = slice(in, len);
	ptrdiff_t route;
	size_t end;

	if (len < 2 || in[0] != '<' || (end = path_end(s)) == len)
		return BSMTP_BAD;
	s = slice(in + 1, end - 1);
	route = route_length(s, utf8);
	if (route < 0)
		return BSMTP_BAD;
	s = slice(s.at + route, s.len - (size_t)route);
	if (!bsmtp_mailbox_valid(s, utf8) &&
	    !((flags & BSMTP_PATH_LOCAL) && route == 0 && s.len > 0 && s.len <= BSMTP_MAILBOX_MAX &&
	    local_part_length(s, utf8) == s.len && (!utf8 || bsmtp_utf8_valid(s))) &&
	    !(s.len == 0 && route == 0 && (flags & BSMTP_PATH_NULL)) &&
	    !((flags & BSMTP_PATH_POSTMASTER) && route == 0 && same(s, "postmaster")))
		return BSMTP_BAD;
	*mailbox = s;
	return (ptrdiff_t)end + 1;
}

ptrdiff_t bsmtp_parameter_parse(struct bsmtp_parameter *parameter, const char *in, size_t len)
{
	size_t i = 0, start;

	while (i < len && in[i] == ' ')
		i++;
	start = i;
	while (i < len && (is_alnum(in[i]) || (in[i] == '-' && i > start)))
		i++;
	if (start == 0 || i == start)
		return BSMTP_BAD;
	parameter->keyword = slice(in + start, i - start);
	parameter->value = slice(NULL, 0);
	if (i < len && in[i] == '=') {
		start = ++i;
		while (i < len && in[i] != '=' && in[i] != 127 && (in[i] > ' ' || is_8bit(in[i])))
			i++;
		if (i == start)
			return BSMTP_BAD;
		parameter->value = slice(in + start, i - start);
	}
	return i == len || in[i] == ' ' ? (ptrdiff_t)i : BSMTP_BAD;
}

/* Behind "FROM:" or "TO:"; spaces before the path are common, and harmless. */
static bool path_argument(struct bsmtp_slice *argument, const char *word)
{
	size_t n = strlen(word);

	if (argument->len < n || !same(slice(argument->at, n), word))
		return false;
	*argument = trim(slice(argument->at + n, argument->len - n));
	return true;
}

/* ---- headers, RFC 5322 ---- */

ptrdiff_t bsmtp_field_parse(struct bsmtp_field *field, const char *in, size_t len, bool last)
{
	size_t i = 0, name;

	while (i < len && in[i] > ' ' && in[i] <= '~' && in[i] != ':')
		i++;
	name = i;
	while (i < len && is_blank(in[i]))      /* RFC 5322 4.5.8 */
		i++;
	if (i == len)
		return last || (name == 0 && len > 0) ? BSMTP_BAD : BSMTP_MORE;
	if (name == 0 || in[i] != ':')
		return BSMTP_BAD;
	field->name = slice(in, name);
	field->body.at = in + ++i;
	for (;;) {
		const char *end = i < len ? memchr(in + i, '\n', len - i) : NULL;
		if (end == NULL && !last)
			return BSMTP_MORE;
		i = end == NULL ? len : (size_t)(end - in) + 1;
		if (i == len && !last)
			return BSMTP_MORE;
		if (i == len || !is_blank(in[i]))
			break;
	}
	field->body.len = (size_t)(in + i - field->body.at);
	return (ptrdiff_t)i;
}

bool bsmtp_field_is(const struct bsmtp_field *field, const char *name)
{
	return same(field->name, name);
}

/* What is passed over between the words of an address: white space, folds,
 * comments with their nesting and quoted pairs (RFC 5322 3.2.2). */
static void skip_cfws(struct bsmtp_slice *s)
{
	size_t i = 0, depth = 0;

	for (; i < s->len; i++) {
		char c = s->at[i];
		if (c == '(')
			depth++;
		else if (depth > 0 && c == ')')
			depth--;
		else if (depth > 0 && c == '\\' && i + 1 < s->len)
			i++;
		else if (depth == 0 && !is_space(c))
			break;
	}
	*s = slice(s->at + i, s->len - i);
}

/* The next word of a list: a quoted string, a domain literal, a run of atext
 * and dots, or a single special. */
static struct bsmtp_slice next_word(struct bsmtp_slice *s)
{
	struct bsmtp_slice word;
	size_t i = 0;

	skip_cfws(s);
	if (s->len > 0 && (s->at[0] == '"' || s->at[0] == '[')) {
		char close = s->at[0] == '"' ? '"' : ']';
		for (i = 1; i < s->len && s->at[i] != close; i++)
			if (s->at[i] == '\\' && i + 1 < s->len)
				i++;
		i = min_size(i + 1, s->len);
	} else {
		while (i < s->len && (is_atext(s->at[i]) || is_8bit(s->at[i]) || s->at[i] == '.'))
			i++;
		if (i == 0 && s->len > 0)
			i = 1;
	}
	word = slice(s->at, i);
	*s = slice(s->at + i, s->len - i);
	return word;
}

/* A word; not one whose quote or bracket is never closed. */
static bool is_word(struct bsmtp_slice w)
{
	char first = w.len > 0 ? w.at[0] : '\0', last = w.len > 1 ? w.at[w.len - 1] : '\0';

	if (first == '"' || first == '[')
		return last == (first == '"' ? '"' : ']');
	return first == '.' || is_atext(first) || is_8bit(first);
}

/* Whether w goes on with the address collected so far: words are joined by dots
 * and "@" alone, else they are a phrase. */
static bool is_joined(const struct text *t, struct bsmtp_slice w)
{
	char last = t->len > 0 ? t->at[t->len - 1] : '.';

	return last == '.' || last == '@' || w.at[0] == '.' || w.at[0] == '@';
}

/* One pass over the words of an address: what is collected so far is a display
 * name until "<" starts it again, a group's name until ":" drops it. */
int bsmtp_address_next(struct bsmtp_slice *list, char *out, size_t *len)
{
	struct text t = { out, 0, BSMTP_MAILBOX_MAX };
	bool angle = false, closed = false, phrase = false;

	if (list->len == 0)             /* its `at` may be NULL */
		*list = slice("", 0);
	for (;;) {
		struct bsmtp_slice w = next_word(list);
		char c = w.len > 0 ? w.at[0] : '\0';
		if (w.len == 0 || (!angle && (c == ',' || c == ';'))) {
			*len = t.len;
			if (angle || phrase)
				return -1;
			if (t.len > 0)
				return 1;
			if (w.len == 0)
				return 0;
			closed = false;
		} else if (c == '<' && !angle && !closed) {
			angle = true;
			phrase = false;
			t.len = 0;
		} else if (c == '>' && angle) {
			angle = false;
			closed = true;
		} else if (c == ':' && !closed) {
			phrase = false;
			t.len = 0;      /* a group's name, or a route */
		} else if ((is_word(w) || c == '@' || (c == ',' && angle)) && !closed) {
			/* too long for an address, it may still be a name */
			phrase = phrase || (c != ',' && !is_joined(&t, w)) || t.len + w.len > t.cap;
			put(&t, w);
		} else {
			return -1;
		}
	}
}

/* ---- mbox, RFC 4155 ---- */

/* One blank-separated word from the end of s. */
static struct bsmtp_slice last_word(struct bsmtp_slice *s)
{
	size_t end, start;

	while (s->len > 0 && is_blank(s->at[s->len - 1]))
		s->len--;
	end = start = s->len;
	while (start > 0 && !is_blank(s->at[start - 1]))
		start--;
	s->len = start;
	return slice(s->at + start, end - start);
}

/* Whether w has the shape of `form`: 9 is a digit, anything else itself. */
static bool has_form(struct bsmtp_slice w, const char *form)
{
	size_t i = 0;

	for (; i < w.len && form[i] != '\0'; i++)
		if (form[i] == '9' ? !is_digit(w.at[i]) : w.at[i] != form[i])
			return false;
	return i == w.len && form[i] == '\0';
}

static bool is_time(struct bsmtp_slice w)
{
	return has_form(w, "99:99:99") || has_form(w, "99:99") || has_form(w, "9:99:99") ||
	    has_form(w, "9:99");
}

/* +0100, -0500, GMT, CEST */
static bool is_zone(struct bsmtp_slice w)
{
	if (has_form(w, "+9999") || has_form(w, "-9999"))
		return true;
	for (size_t i = 0; i < w.len; i++)
		if (!is_alpha(w.at[i]))
			return false;
	return w.len >= 1 && w.len <= 5;
}

static bool in_list(struct bsmtp_slice w, const char *list)
{
	if (w.len != 3)
		return false;
	for (; *list != '\0'; list += 3)
		if (memcmp(w.at, list, 3) == 0)
			return true;
	return false;
}

/* sender Www Mmm dd hh:mm[:ss] [zone] yyyy [zone], read from its end, for the
 * sender may hold anything. */
static bool is_from_date(struct bsmtp_slice *s)
{
	struct bsmtp_slice w = last_word(s);

	if (!has_form(w, "9999")) {
		if (!is_zone(w) || !has_form(last_word(s), "9999"))
			return false;
	}
	w = last_word(s);
	if (!is_time(w)) {
		if (!is_zone(w) || !is_time(last_word(s)))
			return false;
	}
	w = last_word(s);
	return (has_form(w, "9") || has_form(w, "99")) &&
	    in_list(last_word(s), "JanFebMarAprMayJunJulAugSepOctNovDec") &&
	    in_list(last_word(s), "MonTueWedThuFriSatSun");
}

ptrdiff_t bsmtp_from_line_parse(struct bsmtp_slice *sender, const char *in, size_t len)
{
	size_t window = min_size(len, BSMTP_FROM_LINE_MAX);
	const char *end;
	struct bsmtp_slice s;

	if (len == 0)
		return BSMTP_MORE;
	if (memcmp(in, "From ", min_size(len, 5)) != 0)
		return BSMTP_BAD;
	end = window > 0 ? memchr(in, '\n', window) : NULL;
	if (end == NULL)
		return window < BSMTP_FROM_LINE_MAX ? BSMTP_MORE : BSMTP_BAD;
	s = slice(in + 5, (size_t)(end - in) - 5);
	if (s.len > 0 && s.at[s.len - 1] == '\r')
		s.len--;
	if (!is_from_date(&s))
		return BSMTP_BAD;
	*sender = trim(s);
	return end - in + 1;
}

enum { MBOX_START, MBOX_LINE, MBOX_MIDDLE, MBOX_OVER };

/* The octets of a blank line at the head of in[0..len), where a From_ line or
 * the end of the file may follow it; no other is ever withheld. */
static ptrdiff_t blank_before_from(const char *in, size_t len, bool last)
{
	size_t n = in[0] == '\n' ? 1 : in[0] == '\r' ? 2 : 0;

	if (n == 0 || (n == 2 && len > 1 && in[1] != '\n'))
		return BSMTP_BAD;
	if (len < n)
		return last ? BSMTP_BAD : BSMTP_MORE;
	return len == n || in[n] == 'F' ? (ptrdiff_t)n : BSMTP_BAD;
}

/* ">From " at the head of s, as the variant has it: 1 yes, 0 more, -1 no. */
static int is_quoted_from(const struct bsmtp_mbox *m, const char *in, size_t len, bool last)
{
	size_t i = 0, most = m->mboxo ? 1 : BSMTP_FROM_LINE_MAX - 5;

	while (i < len && i < most && in[i] == '>')
		i++;
	if (i == 0 && len > 0)
		return -1;
	if (memcmp(in + i, "From ", min_size(len - i, 5)) != 0)
		return -1;
	return len - i >= 5 ? 1 : last ? -1 : 0;
}

/* Where the blank line begins that ends at in[0..end); `end` if none does. */
static size_t blank_behind(const char *in, size_t end)
{
	size_t at = end > 0 && in[end - 1] == '\n' ? end - 1 : end;

	if (at < end && at > 0 && in[at - 1] == '\r')
		at--;
	return at < end && at > 0 && in[at - 1] == '\n' ? at : end;
}

/* The line that begins at in[at] may become one that needs a look, with more. */
static bool is_open_line(const char *in, size_t at, size_t len)
{
	return at < len && (in[at] == '>' || in[at] == '\r');
}

/* How far text runs, from the start of a line that needs no look, to one that
 * does; *at_line: it ended with a line.  The needle is the F of "From ", rarer than
 * a line's end: everything that matters stands around one, or at the input's end. */
static size_t plain_run(const char *in, size_t len, bool *at_line)
{
	const char *f = in;
	size_t line;

	*at_line = true;
	for (; (f = memchr(f, 'F', (size_t)(in + len - f))) != NULL; f++) {
		size_t start = (size_t)(f - in);
		line = start;
		while (line > 0 && in[line - 1] == '>')
			line--;
		if (line == 0 || in[line - 1] != '\n')
			continue;
		if (line < start)
			return line;
		line = blank_behind(in, start);
		if (line < start && line > 0)
			return line;
	}
	for (line = len; line > 0 && in[line - 1] != '\n'; line--)
		;
	if (line > 0 && (line == len || is_open_line(in, line, len)))
		line = blank_behind(in, line) > 0 && line == len ? blank_behind(in, line) : line;
	else
		line = len;
	*at_line = in[line - 1] == '\n';
	return line;
}

static enum bsmtp_mbox_event mbox_text(struct bsmtp_mbox *m, struct bsmtp_slice text,
    size_t *used, struct bsmtp_slice *out, int state)
{
	*used += text.len;
	*out = text;
	m->state = (unsigned char)state;
	return BSMTP_MBOX_TEXT;
}

/* The blank line withheld turns out to be the message's own. */
static enum bsmtp_mbox_event mbox_release(struct bsmtp_mbox *m, struct bsmtp_slice *out)
{
	*out = slice_of(m->pending == 2 ? "\r\n" : "\n");
	m->pending = 0;
	return BSMTP_MBOX_TEXT;
}

/* A line that begins with ">": one octet of it may be quoting. */
static enum bsmtp_mbox_event mbox_quoted(struct bsmtp_mbox *m, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *out)
{
	int quoted = is_quoted_from(m, in, len, last);
	const char *end;

	if (quoted == 0)
		return BSMTP_MBOX_NEED;
	if (quoted > 0) {
		*used += 1;
		in++;
		len--;
	}
	end = memchr(in, '\n', len);
	return mbox_text(m, slice(in, end != NULL ? (size_t)(end - in) + 1 : len), used, out,
	    end != NULL ? MBOX_LINE : MBOX_MIDDLE);
}

/* At the start of a line.  NEED with octets used: a blank line was withheld. */
static enum bsmtp_mbox_event mbox_line(struct bsmtp_mbox *m, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *out)
{
	ptrdiff_t n;
	bool at_line;
	size_t run;

	if (len == 0 && !last)
		return BSMTP_MBOX_NEED;
	if (len == 0) {
		m->pending = 0;
		m->state = MBOX_OVER;
		return BSMTP_MBOX_END;
	}
	if (m->pending != 0) {
		n = bsmtp_from_line_parse(out, in, len);
		if (n == BSMTP_MORE && !last)
			return BSMTP_MBOX_NEED;
		if (n <= 0)
			return mbox_release(m, out);
		m->pending = 0;
		m->state = MBOX_START;
		return BSMTP_MBOX_END;
	}
	n = blank_before_from(in, len, last);
	if (n >= 0) {
		m->pending = (unsigned char)n;
		*used += (size_t)n;
		return BSMTP_MBOX_NEED;
	}
	if (in[0] == '>')
		return mbox_quoted(m, in, len, last, used, out);
	run = plain_run(in, len, &at_line);
	return mbox_text(m, slice(in, run), used, out, at_line ? MBOX_LINE : MBOX_MIDDLE);
}

enum bsmtp_mbox_event bsmtp_mbox_next(struct bsmtp_mbox *m, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *out)
{
	*used = 0;
	in = len > 0 ? in : "";
	*out = slice(in, 0);
	for (;;) {
		const char *at = in + *used;
		size_t left = len - *used, before = *used;
		enum bsmtp_mbox_event event;
		ptrdiff_t from;

		switch (m->state) {
		case MBOX_START:
			if (left == 0 && last) {
				m->state = MBOX_OVER;
				break;
			}
			if (left == 0)
				return BSMTP_MBOX_NEED;
			from = bsmtp_from_line_parse(out, at, left);
			if (from == BSMTP_MORE && !last)
				return BSMTP_MBOX_NEED;
			if (from <= 0)
				return BSMTP_MBOX_BAD;
			*used += (size_t)from;
			m->state = MBOX_LINE;
			return BSMTP_MBOX_BEGIN;
		case MBOX_LINE:
			event = mbox_line(m, at, left, last, used, out);
			if (event != BSMTP_MBOX_NEED || *used == before)
				return event;
			break;
		case MBOX_MIDDLE:
			if (left == 0 && !last)
				return BSMTP_MBOX_NEED;
			if (left == 0) {
				m->state = MBOX_LINE;
				break;
			}
			at = memchr(at, '\n', left);
			left = at != NULL ? (size_t)(at - in) + 1 - *used : left;
			return mbox_text(m, slice(in + *used, left), used, out,
			    at != NULL ? MBOX_LINE : MBOX_MIDDLE);
		default:
			return BSMTP_MBOX_DONE;
		}
	}
}

size_t bsmtp_quote(struct bsmtp_quoter *q, const char *in, size_t len, struct bsmtp_slice *text)
{
	static const char from[] = "From ";
	const char *lf = in;
	size_t i = 0;

	*text = slice(in, 0);
	if (!q->middle) {
		while (q->matched == 0 && i < len && in[i] == '>')
			i++;
		if (i > 0) {
			*text = slice(in, i);
			return i;
		}
		while (i < len && q->matched < 5 && in[i] == from[q->matched]) {
			q->matched++;
			i++;
		}
		if (i == len && q->matched < 5)
			return i;
		*text = q->matched == 5 ? slice_of(">From ") : slice(from, q->matched);
		q->matched = 0;
		q->middle = true;
		if (text->len > 0)
			return i;
	}
	while (lf != NULL && i < len && (i == 0 || (in[i] != '>' && in[i] != 'F'))) {
		lf = memchr(in + i, '\n', len - i);
		i = lf != NULL ? (size_t)(lf - in) + 1 : len;
	}
	q->middle = lf == NULL;
	*text = slice(in, i);
	return i;
}

void bsmtp_quote_end(struct bsmtp_quoter *q, struct bsmtp_slice *text)
{
	*text = slice("From ", q->matched);
	memset(q, 0, sizeof *q);
}

/* ---- the stream at rest, RFC 2442 ---- */

enum { BATCH_COMMANDS, BATCH_OPEN, BATCH_BODY };

/* What each command of a batch is for; it is another's copy, so that verbs which
 * say nothing about mail are passed over, and only foreign matter stops it. */
static const struct {
	const char *name;
	enum { BATCH_IDLE, BATCH_RESETS, BATCH_BETWEEN, BATCH_MAIL, BATCH_RCPT, BATCH_DATA } does;
} batch_verbs[] = {
	{ "MAIL", BATCH_MAIL }, { "RCPT", BATCH_RCPT }, { "DATA", BATCH_DATA },
	{ "HELO", BATCH_BETWEEN }, { "EHLO", BATCH_BETWEEN }, { "BSMTP", BATCH_BETWEEN },
	{ "RSET", BATCH_RESETS }, { "QUIT", BATCH_BETWEEN }, { "NOOP", BATCH_IDLE },
	{ "VERB", BATCH_IDLE }, { "VERBOSE", BATCH_IDLE }, { "TICK", BATCH_IDLE }, { "", BATCH_IDLE },
};

static enum bsmtp_batch_event batch_bad(struct bsmtp_slice *text, const char *why)
{
	*text = slice_of(why);
	return BSMTP_BATCH_BAD;
}

/* The path and the parameters behind MAIL or RCPT. */
static enum bsmtp_batch_event batch_path(struct bsmtp_slice argument, bool mail,
    struct bsmtp_slice *text, struct bsmtp_slice *parameters)
{
	struct bsmtp_slice rest;
	struct bsmtp_parameter parameter;
	ptrdiff_t used = path_argument(&argument, mail ? "FROM:" : "TO:") ?
	    bsmtp_path_parse(text, argument.at, argument.len, BSMTP_PATH_UTF8 | BSMTP_PATH_LOCAL |
	    (mail ? BSMTP_PATH_NULL : BSMTP_PATH_POSTMASTER)) : BSMTP_BAD;

	if (used <= 0)
		return batch_bad(text, mail ? "MAIL needs FROM:<address>" : "RCPT needs TO:<address>");
	*parameters = rest = slice(argument.at + used, argument.len - (size_t)used);
	for (; rest.len > 0; rest = slice(rest.at + used, rest.len - (size_t)used)) {
		used = bsmtp_parameter_parse(&parameter, rest.at, rest.len);
		if (used <= 0)
			return batch_bad(text, "a parameter is malformed");
	}
	return mail ? BSMTP_BATCH_MAIL : BSMTP_BATCH_RCPT;
}

/* A command without its line end; NEED: it says nothing. */
static enum bsmtp_batch_event batch_command(struct bsmtp_batch *b, struct bsmtp_slice line,
    struct bsmtp_slice *text, struct bsmtp_slice *parameters)
{
	size_t n = 0, row = 0;

	while (n < line.len && line.at[n] != ' ')
		n++;
	while (row < COUNT(batch_verbs) && !same(slice(line.at, n), batch_verbs[row].name))
		row++;
	if (row == COUNT(batch_verbs))
		return batch_bad(text, "no command that a batch may have");
	line = n < line.len ? slice(line.at + n + 1, line.len - n - 1) : slice(line.at + n, 0);
	if (b->state == BATCH_OPEN &&
	    (batch_verbs[row].does == BATCH_BETWEEN || batch_verbs[row].does == BATCH_MAIL))
		return batch_bad(text, "a transaction is open, and only RSET drops it");
	switch (batch_verbs[row].does) {
	case BATCH_MAIL:
		b->state = BATCH_OPEN;
		return batch_path(line, true, text, parameters);
	case BATCH_RCPT:
		return b->state == BATCH_OPEN ? batch_path(line, false, text, parameters) :
		    batch_bad(text, "RCPT without MAIL");
	case BATCH_DATA:
		if (b->state != BATCH_OPEN)
			return batch_bad(text, "DATA without MAIL");
		b->state = BATCH_BODY;
		b->decoder = (struct bsmtp_decoder){ .lf = b->decoder.lf };
		return BSMTP_BATCH_BODY;
	case BATCH_RESETS:
		b->state = BATCH_COMMANDS;
		break;
	case BATCH_IDLE:
	case BATCH_BETWEEN:
		break;
	}
	return BSMTP_BATCH_NEED;
}

/* The command line at the head of in[0..len), without its end. */
static ptrdiff_t batch_line(struct bsmtp_batch *b, const char *in, size_t len, bool last,
    struct bsmtp_slice *line)
{
	size_t window = min_size(len, BSMTP_COMMAND_MAX);
	const char *lf = memchr(in, '\n', window);

	if (lf == NULL && window < BSMTP_COMMAND_MAX && !last)
		return BSMTP_MORE;
	if (lf == NULL && window == BSMTP_COMMAND_MAX)
		return BSMTP_BAD;
	*line = slice(in, lf != NULL ? (size_t)(lf - in) : len);
	if (!b->begun)
		b->decoder.lf = line->len == 0 || line->at[line->len - 1] != '\r';
	b->begun = true;
	b->line++;
	window = line->len + (lf != NULL);
	while (line->len > 0 && is_space(line->at[line->len - 1]))
		line->len--;
	return (ptrdiff_t)window;
}

static enum bsmtp_batch_event batch_body(struct bsmtp_batch *b, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *text)
{
	size_t n = bsmtp_decode(&b->decoder, in, len, text);

	for (size_t i = 0; i < n; i++)
		b->line += in[i] == '\n';
	*used += n;
	if (b->decoder.ended) {
		b->state = BATCH_COMMANDS;
		return BSMTP_BATCH_END;
	}
	if (len == 0 && last)
		return batch_bad(text, "the file ends inside a message");
	return text->len > 0 ? BSMTP_BATCH_TEXT : BSMTP_BATCH_NEED;
}

enum bsmtp_batch_event bsmtp_batch_next(struct bsmtp_batch *b, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *text, struct bsmtp_slice *parameters)
{
	enum bsmtp_batch_event event = BSMTP_BATCH_NEED;

	*used = 0;
	in = len > 0 ? in : "";
	*parameters = *text = slice(in, 0);
	while (event == BSMTP_BATCH_NEED && (*used < len || last)) {
		const char *at = in + *used;
		size_t left = len - *used;
		struct bsmtp_slice line;
		ptrdiff_t n;
		if (b->state == BATCH_BODY) {
			event = batch_body(b, at, left, last, used, text);
			continue;
		}
		if (left == 0)
			return b->state == BATCH_OPEN ?
			    batch_bad(text, "the file ends inside a transaction") : BSMTP_BATCH_DONE;
		n = batch_line(b, at, left, last, &line);
		if (n == BSMTP_MORE)
			break;
		if (n == BSMTP_BAD) {
			b->line++;
			return batch_bad(text, "the line is too long");
		}
		*used += (size_t)n;
		event = batch_command(b, line, text, parameters);
	}
	return event;
}

/* ==== 4 body codecs ====================================================== */

/* Copies up to the first CR or LF, n octets at most; returns how many.  May write
 * all of out[0..n). */
#ifdef WITH_SSE2
/* Looking while copying: 40 instructions a line, where the other way takes 110. */
static size_t copy_line(char *out, const char *in, size_t n)
{
	const __m128i cr = _mm_set1_epi8('\r'), lf = _mm_set1_epi8('\n');
	size_t i = 0;

	for (; n - i >= 32; i += 32) {
		__m128i a = _mm_loadu_si128((const void *)(in + i));
		__m128i b = _mm_loadu_si128((const void *)(in + i + 16));
		__m128i ea = _mm_or_si128(_mm_cmpeq_epi8(a, cr), _mm_cmpeq_epi8(a, lf));
		__m128i eb = _mm_or_si128(_mm_cmpeq_epi8(b, cr), _mm_cmpeq_epi8(b, lf));
		unsigned ends = (unsigned)_mm_movemask_epi8(ea) | (unsigned)_mm_movemask_epi8(eb) << 16;
		_mm_storeu_si128((void *)(out + i), a);
		_mm_storeu_si128((void *)(out + i + 16), b);
		if (ends != 0)
			return i + (size_t)__builtin_ctz(ends);
	}
	for (; i < n && in[i] != '\r' && in[i] != '\n'; i++)
		out[i] = in[i];
	return i;
}
#else
static size_t copy_line(char *out, const char *in, size_t n)
{
	const char *end = memchr(in, '\n', n);

	n = end != NULL ? (size_t)(end - in) : n;
	end = n > 0 ? memchr(in, '\r', n) : NULL;
	n = end != NULL ? (size_t)(end - in) : n;
	memcpy(out, in, n);
	return n;
}
#endif

size_t bsmtp_encode(struct bsmtp_encoder *e, char *out, size_t cap, size_t *made,
    const char *in, size_t len)
{
	bool inside = e->inside;
	size_t i = 0, n = 0;

	while (i < len && cap - n >= 4) {
		if (in[i] == '\n') {
			out[n++] = '\r';
			out[n++] = '\n';
			e->cr = inside = false;
			i++;
		} else if (e->cr) {
			e->strays++;
			out[n++] = ' ';
			e->cr = false;
			inside = true;
		} else if (in[i] == '\r') {
			e->cr = true;
			i++;
		} else {
			size_t run;
			if (!inside && in[i] == '.' && e->dots)
				out[n++] = '.';
			run = copy_line(out + n, in + i, min_size(len - i, cap - n - 2));
			i += run;
			n += run;
			inside = i == len || in[i] != '\n';
			if (inside)
				continue;
			out[n++] = '\r';
			out[n++] = '\n';
			i++;
		}
	}
	e->inside = inside;
	*made = n;
	return i;
}

size_t bsmtp_encode_end(struct bsmtp_encoder *e, char *out)
{
	size_t n = 0;

	if (e->cr) {
		out[n++] = ' ';
		e->strays++;
		e->inside = true;
		e->cr = false;
	}
	if (e->inside) {
		out[n++] = '\r';
		out[n++] = '\n';
		e->inside = false;
	}
	return n;
}

/* The octets just seen: a line's end (or nothing yet), then ".", then CR. */
enum { DOT_LINE, DOT_DOT, DOT_DOT_CR, DOT_MIDDLE, DOT_CR };

/* From inside a line to a "." at the start of one, or to the end of input: one
 * run of text. */
static size_t decode_run(struct bsmtp_decoder *d, const char *in, size_t len)
{
	size_t i = 0;

	while (i < len) {
		const char *end;
		if (d->state == DOT_CR && in[i] == '\n') {
			d->state = DOT_LINE;
			i++;
		} else if (d->state == DOT_LINE) {
			if (in[i] == '.')
				return i;
			d->state = DOT_MIDDLE;
		} else {
			end = memchr(in + i, d->lf ? '\n' : '\r', len - i);
			d->state = end == NULL ? DOT_MIDDLE : d->lf ? DOT_LINE : DOT_CR;
			i = end != NULL ? (size_t)(end - in) + 1 : len;
		}
	}
	return i;
}

size_t bsmtp_decode(struct bsmtp_decoder *d, const char *in, size_t len, struct bsmtp_slice *text)
{
	size_t i = 0, run;

	*text = slice(in, 0);
	if (len == 0 || d->ended)
		return 0;
	if (d->state == DOT_LINE && in[0] == '.') {
		d->state = DOT_DOT;
		if (++i == len)
			return i;
	}
	if (d->state == DOT_DOT && in[i] == '\r') {
		d->state = DOT_DOT_CR;
		if (++i == len)
			return i;
	}
	if (in[i] == '\n' && (d->state == DOT_DOT_CR || (d->state == DOT_DOT && d->lf))) {
		d->ended = true;
		return i + 1;
	}
	if (d->state == DOT_DOT)
		d->state = DOT_MIDDLE;
	if (d->state == DOT_DOT_CR) {
		d->state = DOT_CR;      /* ".\r" was text after all; its dot goes */
		*text = slice_of("\r");
		return i;
	}
	run = decode_run(d, in + i, len - i);
	*text = slice(in + i, run);
	return i + run;
}

/* Good text is a simple fact: an octet is LF where the one before is CR, and
 * nowhere else.  Blocks of fixed size let the compiler test that in parallel.
 * Returns how far it holds. */
static size_t good_newlines(const char *in, size_t len, bool cr)
{
	size_t i = 1;

	if (len == 0 || (in[0] == '\n') != cr)
		return 0;
	for (; len - i >= 64; i += 64) {
		unsigned bad = 0;
		for (size_t k = 0; k < 64; k++)
			bad |= (unsigned)((in[i + k] == '\n') ^ (in[i + k - 1] == '\r'));
		if (bad)
			break;
	}
	while (i < len && (in[i] == '\n') == (in[i - 1] == '\r'))
		i++;
	return i;
}

static void newline_is_bad(struct bsmtp_newlines *n, uint64_t at)
{
	if (!n->bad)
		n->bad_at = at;
	n->bad = true;
}

/* Only watched: the text is what came, and one fault is enough to know. */
static size_t watch_newlines(struct bsmtp_newlines *n, const char *in, size_t len)
{
	size_t good = n->bad ? len : good_newlines(in, len, n->cr);

	if (good < len)
		newline_is_bad(n, n->offset + good - (good > 0 ? in[good - 1] == '\r' : n->cr));
	n->cr = in[len - 1] == '\r';
	return len;
}

/* A CR is withheld until what follows it is known. */
static size_t mend_newlines(struct bsmtp_newlines *n, const char *in, size_t len,
    struct bsmtp_slice *text)
{
	size_t run;

	if (n->cr || in[0] == '\n') {
		run = in[0] == '\n';
		if (!n->cr || run == 0)
			newline_is_bad(n, n->offset - n->cr);
		n->cr = false;
		*text = slice_of("\r\n");
		return run;
	}
	run = good_newlines(in, len, false);
	n->cr = in[run - 1] == '\r';
	*text = slice(in, run - n->cr);
	return run;
}

size_t bsmtp_newlines(struct bsmtp_newlines *n, const char *in, size_t len,
    struct bsmtp_slice *text)
{
	size_t used;

	*text = slice(in, len);
	if (len == 0)
		return 0;
	used = n->normalize ? mend_newlines(n, in, len, text) : watch_newlines(n, in, len);
	n->offset += used;
	return used;
}

void bsmtp_newlines_end(struct bsmtp_newlines *n, struct bsmtp_slice *text)
{
	*text = slice("", 0);
	if (!n->cr)
		return;
	newline_is_bad(n, n->offset - 1);
	if (n->normalize)
		*text = slice_of("\r\n");
	n->cr = false;
}

/* ==== 5 client engine ==================================================== */

/* The four manners; nothing else tells them apart. */
static const struct mode {
	const char *name;
	enum bsmtp_verb opening;
	bool waits_greeting;
	enum { NEVER, GRACE, ALWAYS } waits_opening;
	bool waits_each;
	bool waits_354;
} modes[] = {
	[BSMTP_MODE_BSMTP] = { "bsmtp", BSMTP_VERB_BSMTP, false, GRACE, false, false },
	[BSMTP_MODE_EARLY] = { "early", BSMTP_VERB_EHLO, false, NEVER, false, true },
	[BSMTP_MODE_PIPELINING] = { "pipelining", BSMTP_VERB_EHLO, true, ALWAYS, false, true },
	[BSMTP_MODE_LOCKSTEP] = { "lockstep", BSMTP_VERB_EHLO, true, ALWAYS, true, true },
};

enum client_state {
	CLIENT_GREETING,        /* waits for the greeting before it opens */
	CLIENT_OPENING,         /* waits for the opening's reply */
	CLIENT_GRACE,           /* likewise, but not for ever */
	CLIENT_TLS,             /* waits for the reply that TLS follows */
	CLIENT_SECURING,        /* waits for TLS */
	CLIENT_AUTH,            /* waits for AUTH's reply */
	CLIENT_MAIL,            /* between messages */
	CLIENT_RCPT,            /* among the recipients */
	CLIENT_DATA,            /* waits for 354 */
	CLIENT_HOLD,            /* waits for the opening's reply before a body */
	CLIENT_BODY,
	CLIENT_SKIP,            /* the message will not be sent: drop it */
	CLIENT_QUIT,            /* all is written: replies are read */
	CLIENT_MUTE,            /* refused late: replies are read, no more is sent */
	CLIENT_OVER
};

/* Whether a reply answers the command that it is counted for. */
enum alignment {
	ALIGNED,
	DOUBTFUL,               /* that one or the next: the opening may have had no reply */
	LOST                    /* no: it has turned out that there was one too many or too few */
};

/* The enhanced status codes of a reply's lines (RFC 2034). */
enum statuses { NO_STATUS, MAIL_STATUS, OTHER_STATUS };

/* What can refuse a message, in the order in which it decides. */
enum decider { BY_MAIL, BY_RCPT, BY_TEXT, BY_END, DECIDERS };

/* Whether all replies around a fate and for it were of one kind. */
enum uniform { MIXED, ALL_GOOD, ALL_BAD };

/* Room kept behind the body for its end, and for a BDAT line that turns out
 * longer than foreseen: "BDAT " 20 digits " LAST" CRLF. */
enum { HEADER_MAX = 32, RESERVE = HEADER_MAX + 16, DUE_RESERVE = 4 };

static const struct mode *mode_of(const struct bsmtp_client *c)
{
	return &modes[c->config->mode];
}

static void tap_line(bsmtp_tap *tap, void *context, enum bsmtp_tap_kind kind,
    struct bsmtp_slice line, uint64_t octets)
{
	if (tap != NULL)
		tap(context, kind, line, octets);
}

static size_t client_room(const struct bsmtp_client *c)
{
	return c->out_size - c->made > RESERVE ? c->out_size - c->made - RESERVE : 0;
}

/* Among the replies due: that to the last chunk, where the others have their verb. */
enum { LAST_CHUNK = BSMTP_VERBS };

/* Where number i of the replies due is in the ring, or would be. */
static size_t due_at(const struct bsmtp_client *c, size_t i)
{
	size_t at = c->due_first + i;

	return at < c->due_size ? at : at - c->due_size;
}

static void expect(struct bsmtp_client *c, unsigned verb)
{
	c->due[due_at(c, c->due_count++)] = (unsigned char)verb;
	c->mails_due += verb == BSMTP_VERB_MAIL;
}

/* The command that reply number i of those due is counted for. */
static enum bsmtp_verb due_verb(const struct bsmtp_client *c, size_t i)
{
	unsigned verb = i < c->due_count ? c->due[due_at(c, i)] : BSMTP_VERB_UNKNOWN;

	return verb == LAST_CHUNK ? BSMTP_VERB_BODY : (enum bsmtp_verb)verb;
}

static bool is_chunk_due(const struct bsmtp_client *c)
{
	return c->due[c->due_first] == BSMTP_VERB_BDAT || c->due[c->due_first] == LAST_CHUNK;
}

static void answered(struct bsmtp_client *c)
{
	c->mails_due -= due_verb(c, 0) == BSMTP_VERB_MAIL;
	c->due_first = due_at(c, 1);
	c->due_count--;
}

/* Appends a line to what may go; `verb` is the reply it asks for. */
static void write_line(struct bsmtp_client *c, enum bsmtp_verb verb, struct bsmtp_slice line)
{
	struct text t = { c->out, c->made, c->out_size };

	tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_COMMAND, line, 0);
	put(&t, line);
	put_string(&t, "\r\n");
	c->made = c->ready = t.len;
	expect(c, verb);
}

/* These show that replies and commands do not match, and nobody knows since when. */
static bool is_miscount(enum bsmtp_error error)
{
	return error == BSMTP_E_UNASKED || error == BSMTP_E_OUT_OF_PLACE ||
	    error == BSMTP_E_MISCOUNTED;
}

static void fail(struct bsmtp_client *c, struct bsmtp_client_event *event,
    enum bsmtp_error error)
{
	event->type = BSMTP_CLIENT_ERROR;
	event->error = error;
	c->state = CLIENT_OVER;
	if (is_miscount(error))
		c->alignment = LOST;
}

/* A line that no transcript shows. */
static void write_secret(struct bsmtp_client *c, enum bsmtp_verb verb, struct bsmtp_slice line,
    const char *shown)
{
	struct text t = { c->out, c->made, c->out_size };

	tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_COMMAND, slice_of(shown), 0);
	put(&t, line);
	put_string(&t, "\r\n");
	c->made = c->ready = t.len;
	expect(c, verb);
}

static bool wants_auth(const struct bsmtp_client *c)
{
	return c->config->user != NULL && !c->authed;
}

enum { AUTH_QUESTIONS = 2 };    /* that LOGIN has */

/* PLAIN with its initial response, no turnaround (RFC 4954 4); LOGIN where a server
 * has nothing else. */
static void write_auth(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	char line[1024], plain[520];
	struct text t = { line, 0, sizeof line }, p = { plain, 0, sizeof plain };
	bool login = c->opened && !c->auth_plain && c->auth_login;

	c->authed = true;
	c->auth_asked = login ? 0 : AUTH_QUESTIONS;
	if (c->opened && !c->auth_plain && !c->auth_login) {
		fail(c, event, BSMTP_E_AUTH);
		return;
	}
	put(&p, slice("", 1));
	put_string(&p, c->config->user);
	put(&p, slice("", 1));
	put_string(&p, c->config->password);
	put_string(&t, login ? "AUTH LOGIN" : "AUTH PLAIN ");
	if (!login)
		put_base64(&t, slice(plain, p.len));
	write_secret(c, BSMTP_VERB_AUTH, slice(line, t.len), login ? "AUTH LOGIN" : "AUTH PLAIN ****");
	if (mode_of(c)->opening != BSMTP_VERB_BSMTP)
		c->state = CLIENT_AUTH;
	memset(line, 0, sizeof line);
	memset(plain, 0, sizeof plain);
}

static void write_opening(struct bsmtp_client *c, enum bsmtp_verb verb)
{
	char line[BSMTP_COMMAND_MAX];
	struct text t = { line, 0, sizeof line - 2 };
	const struct mode *mode = mode_of(c);
	bool insecure = c->config->starttls && !c->secure;

	put_string(&t, bsmtp_verb_name(verb));
	put_string(&t, " ");
	put(&t, slice(c->config->helo, min_size(strlen(c->config->helo), BSMTP_DOMAIN_MAX)));
	if (insecure && verb == BSMTP_VERB_BSMTP)
		put_string(&t, " STARTTLS");
	write_line(c, verb, slice(line, t.len));
	if (insecure) {                 /* nothing more goes in the clear */
		c->state = verb == BSMTP_VERB_BSMTP ? CLIENT_TLS : CLIENT_OPENING;
		return;
	}
	c->state = mode->waits_opening == ALWAYS ? CLIENT_OPENING :
	    mode->waits_opening == GRACE && !c->config->no_grace ? CLIENT_GRACE : CLIENT_MAIL;
}

void bsmtp_client_init(struct bsmtp_client *c, const struct bsmtp_client_config *config,
    void *out, size_t out_size, void *due, size_t due_size)
{
	memset(c, 0, sizeof *c);
	c->config = config;
	c->out = out;
	c->out_size = out_size;
	c->due = due;
	c->due_size = due_size;
	c->lockstep = mode_of(c)->waits_each;
	c->header = HEADER_MAX / 2;
	expect(c, BSMTP_VERB_CONNECT);
	if (mode_of(c)->waits_greeting || config->await_greeting)
		c->state = CLIENT_GREETING;
	else
		write_opening(c, mode_of(c)->opening);
}

static void write_reset(struct bsmtp_client *c)
{
	write_line(c, BSMTP_VERB_RSET, slice_of("RSET"));
	c->unsure = false;
}

/* A refused DATA or BDAT may leave the transaction open (RFC 3030 2, Exim 4.96),
 * and in a stream that is not known yet. */
static bool needs_reset(const struct bsmtp_client *c)
{
	return c->unsure && !(c->offered & BSMTP_KEY_BSMTP);
}

/* Between commands: whether the next one may be written. */
static enum bsmtp_want want_command(const struct bsmtp_client *c, enum bsmtp_want want)
{
	if (c->lockstep && c->due_count > 0)
		return BSMTP_WANT_REPLY;
	if (client_room(c) < BSMTP_COMMAND_MAX)
		return BSMTP_WANT_ROOM;
	return c->due_count + DUE_RESERVE > c->due_size ? BSMTP_WANT_REPLY : want;
}

static enum bsmtp_want want_body(const struct bsmtp_client *c)
{
	if (c->due_count + 2 > c->due_size || (c->lockstep && !c->chunk_open && c->due_count > 0))
		return BSMTP_WANT_REPLY;
	if (client_room(c) >= HEADER_MAX + 4 || (c->chunk_open && c->ready == 0))
		return BSMTP_WANT_BODY;
	return BSMTP_WANT_ROOM;
}

enum bsmtp_want bsmtp_client_want(const struct bsmtp_client *c)
{
	switch ((enum client_state)c->state) {
	case CLIENT_GREETING:
	case CLIENT_OPENING:
	case CLIENT_DATA:
	case CLIENT_HOLD:
		return BSMTP_WANT_REPLY;
	case CLIENT_AUTH:
		return BSMTP_WANT_REPLY;
	case CLIENT_GRACE:
		return BSMTP_WANT_GRACE;
	case CLIENT_TLS:
		return mode_of(c)->opening == BSMTP_VERB_BSMTP ? BSMTP_WANT_TLS : BSMTP_WANT_REPLY;
	case CLIENT_SECURING:
		return BSMTP_WANT_SECURED;
	case CLIENT_MAIL:
		return want_command(c, BSMTP_WANT_MAIL);
	case CLIENT_RCPT:
		return want_command(c, BSMTP_WANT_RCPT);
	case CLIENT_BODY:
		return want_body(c);
	case CLIENT_SKIP:
		return BSMTP_WANT_SKIP;
	case CLIENT_QUIT:
	case CLIENT_MUTE:
		return c->due_count > 0 ? BSMTP_WANT_REPLY : BSMTP_WANT_NOTHING;
	case CLIENT_OVER:
		return BSMTP_WANT_NOTHING;
	}
	return BSMTP_WANT_NOTHING;
}

/* What may be used of BSMTP without having been offered: that is prearranged. */
enum { PREARRANGED = BSMTP_KEY_PIPELINING | BSMTP_KEY_CHUNKING | BSMTP_KEY_8BITMIME |
	BSMTP_KEY_SMTPUTF8 | BSMTP_KEY_SIZE };

static unsigned client_keys(const struct bsmtp_client *c)
{
	bool unheard = !c->opened && mode_of(c)->opening == BSMTP_VERB_BSMTP;

	return c->offered | (unheard ? PREARRANGED : 0);
}

/* The esmtp-params that are passed on, and what must be offered for each. */
static const struct {
	const char *name;
	unsigned key;
} parameter_rows[] = {
	{ "BODY", BSMTP_KEY_8BITMIME }, { "SMTPUTF8", BSMTP_KEY_SMTPUTF8 },
	{ "SIZE", BSMTP_KEY_SIZE }, { "ENVID", BSMTP_KEY_DSN }, { "RET", BSMTP_KEY_DSN },
	{ "NOTIFY", BSMTP_KEY_DSN }, { "ORCPT", BSMTP_KEY_DSN }, { "TRANSID", BSMTP_KEY_BSMTP },
};

/* Puts a parameter whole, or not at all. */
static void put_parameter(struct text *t, struct bsmtp_slice parameter)
{
	if (parameter.len <= t->cap - t->len)
		put(t, parameter);
}

/* Puts those of a list that may be used; returns the keys of all that it names. */
static unsigned put_parameters(struct text *t, struct bsmtp_slice list, unsigned keys)
{
	struct bsmtp_parameter p;
	unsigned named = 0;
	ptrdiff_t n;

	while ((n = bsmtp_parameter_parse(&p, list.at, list.len)) > 0) {
		for (size_t i = 0; i < COUNT(parameter_rows); i++) {
			if (!same(p.keyword, parameter_rows[i].name))
				continue;
			named |= parameter_rows[i].key;
			if (keys & parameter_rows[i].key)
				put_parameter(t, slice(list.at, (size_t)n));
		}
		list = slice(list.at + n, list.len - (size_t)n);
	}
	return named;
}

void bsmtp_client_mail(struct bsmtp_client *c, struct bsmtp_slice mailbox, bool utf8,
    uint64_t size, struct bsmtp_slice parameters)
{
	char line[BSMTP_COMMAND_MAX], number[32];
	struct text t = { line, 0, sizeof line - 2 }, sized = { number, 0, sizeof number };
	unsigned keys = client_keys(c);

	if (wants_auth(c))              /* in the stream of BSMTP */
		write_auth(c, &(struct bsmtp_client_event){ .type = BSMTP_CLIENT_NONE });
	if (needs_reset(c))
		write_reset(c);
	put_string(&t, "MAIL FROM:<");
	put(&t, mailbox);
	put_string(&t, ">");
	keys &= ~put_parameters(&t, parameters, keys);
	if (keys & BSMTP_KEY_8BITMIME)
		put_parameter(&t, slice_of(" BODY=8BITMIME"));
	if (utf8 && (keys & BSMTP_KEY_SMTPUTF8))
		put_parameter(&t, slice_of(" SMTPUTF8"));
	put_string(&sized, " SIZE=");
	put_number(&sized, size);
	if (size > 0 && (keys & BSMTP_KEY_SIZE))
		put_parameter(&t, slice(number, sized.len));
	write_line(c, BSMTP_VERB_MAIL, slice(line, t.len));
	c->unsure = c->writing = c->streamed = true;
	c->addressed = false;
	c->state = CLIENT_RCPT;
}

void bsmtp_client_rcpt(struct bsmtp_client *c, struct bsmtp_slice mailbox,
    struct bsmtp_slice parameters)
{
	char line[BSMTP_COMMAND_MAX];
	struct text t = { line, 0, sizeof line - 2 };

	put_string(&t, "RCPT TO:<");
	put(&t, mailbox);
	put_string(&t, ">");
	(void)put_parameters(&t, parameters, client_keys(c));
	write_line(c, BSMTP_VERB_RCPT, slice(line, t.len));
}

/* BDAT that is not known there would have its chunks run as commands: it is used
 * where it is offered, and by a peer of BSMTP that has not replied yet, for that is
 * the prearrangement. */
static bool use_bdat(const struct bsmtp_client *c)
{
	bool may = (client_keys(c) & BSMTP_KEY_CHUNKING) != 0;

	switch (c->config->framing) {
	case BSMTP_FRAMING_BDAT:
		return may || c->config->blind;
	case BSMTP_FRAMING_DATA:
		return false;
	case BSMTP_FRAMING_AUTO:
	case BSMTP_FRAMINGS:
		break;
	}
	return may;
}

/* A body behind a refused DATA would be run as commands, unless the server
 * has said that it keeps the rule of BSMTP: 354 always. */
static bool must_see_354(const struct bsmtp_client *c)
{
	return mode_of(c)->waits_354 || (!(c->offered & BSMTP_KEY_BSMTP) && !c->config->blind);
}

static void begin_body_text(struct bsmtp_client *c)
{
	c->bdat = use_bdat(c);
	c->encoder.dots = !c->bdat;
	c->state = CLIENT_BODY;
	if (c->bdat)
		return;
	write_line(c, BSMTP_VERB_DATA, slice_of("DATA"));
	if (must_see_354(c))
		c->state = CLIENT_DATA;
}

void bsmtp_client_rcpt_end(struct bsmtp_client *c)
{
	c->addressed = true;
}

void bsmtp_client_data(struct bsmtp_client *c)
{
	bool unknown = mode_of(c)->opening != BSMTP_VERB_BSMTP && !c->opened;

	bsmtp_client_rcpt_end(c);
	/* Replies are in when in lockstep: do not offer a body to nobody. */
	if (c->lockstep && c->rcpts_good == 0) {
		c->state = CLIENT_SKIP;
		return;
	}
	c->strays += c->encoder.strays;
	memset(&c->encoder, 0, sizeof c->encoder);
	c->body_octets = 0;
	if (unknown && c->config->framing == BSMTP_FRAMING_BDAT && !c->config->blind)
		c->state = CLIENT_HOLD;         /* BDAT is wanted: wait to hear of it */
	else
		begin_body_text(c);
}

/* A chunk's length is known when it is full, and its BDAT line stands before
 * it: as much room is kept as the last such line took, which is nearly always
 * right; else the chunk is moved. */
static void open_chunk(struct bsmtp_client *c)
{
	c->made = c->ready + c->header;
	c->chunk_open = true;
}

static void close_chunk(struct bsmtp_client *c, bool last)
{
	char line[HEADER_MAX];
	struct text t = { line, 0, sizeof line };
	size_t body = c->made - c->ready - c->header;

	put_string(&t, "BDAT ");
	put_number(&t, body);
	put_string(&t, last ? " LAST\r\n" : "\r\n");
	if (t.len != c->header)
		memmove(c->out + c->ready + t.len, c->out + c->ready + c->header, body);
	memcpy(c->out + c->ready, line, t.len);
	c->header = t.len;
	c->made = c->ready = c->ready + t.len + body;
	c->chunk_open = false;
	expect(c, last ? LAST_CHUNK : BSMTP_VERB_BDAT);
	tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_COMMAND,
	    slice(line, t.len - 2), 0);
	tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_BODY, slice("", 0), body);
}

size_t bsmtp_client_body(struct bsmtp_client *c, const char *in, size_t len)
{
	size_t used = 0;

	while (used < len && want_body(c) == BSMTP_WANT_BODY) {
		size_t made;
		if (c->bdat && !c->chunk_open)
			open_chunk(c);
		if (client_room(c) < 4) {
			close_chunk(c, false);
			continue;
		}
		used += bsmtp_encode(&c->encoder, c->out + c->made, client_room(c), &made,
		    in + used, len - used);
		c->made += made;
		c->body_octets += made;
		if (!c->bdat)
			c->ready = c->made;
	}
	return used;
}

static void end_of_data(struct bsmtp_client *c)
{
	memcpy(c->out + c->made, ".\r\n", 3);
	c->made += 3;
	c->ready = c->made;
	expect(c, BSMTP_VERB_BODY);
	tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_BODY, slice("", 0),
	    c->body_octets + 3);
	c->writing = false;
	/* Behind a body that 354 asked for, the transaction is over for sure. */
	c->unsure = !must_see_354(c);
}

void bsmtp_client_body_end(struct bsmtp_client *c)
{
	size_t n;

	if (c->bdat && !c->chunk_open)
		open_chunk(c);
	n = bsmtp_encode_end(&c->encoder, c->out + c->made);
	c->made += n;
	c->body_octets += n;
	if (c->bdat)
		close_chunk(c, true);
	else
		end_of_data(c);
	c->writing = false;
	c->state = CLIENT_MAIL;
}

bool bsmtp_client_abandon(struct bsmtp_client *c)
{
	c->writing = false;
	if (!c->bdat)
		return false;
	if (c->chunk_open)
		close_chunk(c, false);
	write_reset(c);
	c->state = CLIENT_MAIL;
	return true;
}

void bsmtp_client_quit(struct bsmtp_client *c)
{
	write_line(c, BSMTP_VERB_QUIT, slice_of("QUIT"));
	c->streamed = true;
	c->state = CLIENT_QUIT;
}

bool bsmtp_client_await_opening(struct bsmtp_client *c)
{
	bool due = c->due_count > 0 && due_verb(c, 0) <= BSMTP_VERB_BSMTP;

	if (c->state != CLIENT_MAIL || !due || (c->offered & BSMTP_KEY_BSMTP))
		return false;
	c->state = mode_of(c)->opening == BSMTP_VERB_BSMTP ? CLIENT_GRACE : CLIENT_OPENING;
	return true;
}

const char *bsmtp_client_out(const struct bsmtp_client *c, size_t *len)
{
	bool mute = c->state == CLIENT_MUTE || c->state == CLIENT_OVER;

	*len = mute ? 0 : c->ready - c->sent;
	return c->out + c->sent;
}

void bsmtp_client_sent(struct bsmtp_client *c, size_t len)
{
	c->sent += len;
	c->sent_total += len;
	/* What is left moves to the front when it is only the open chunk, or
	 * when half the buffer is gained: no octet moves more than a few times. */
	if (c->sent == c->ready || c->sent >= c->out_size / 2) {
		memmove(c->out, c->out + c->sent, c->made - c->sent);
		c->made -= c->sent;
		c->ready -= c->sent;
		c->sent = 0;
	}
}

/* ---- replies ---- */

static enum bsmtp_fate fate_of(int code)
{
	return code / 100 == 2 ? BSMTP_DELIVERED : code / 100 == 4 ? BSMTP_DEFERRED :
	    BSMTP_REJECTED;
}

/* Keeps the reply that decides about the message, so far. */
static void keep_verdict(struct bsmtp_client *c, const struct bsmtp_client_event *reply)
{
	struct text t = { c->verdict_text, 0, sizeof c->verdict_text };

	c->verdict = *reply;
	put(&t, reply->status);
	c->verdict.status = slice(c->verdict_text, t.len);
	put(&t, reply->text);
	c->verdict.text = slice(c->verdict_text + reply->status.len, t.len - reply->status.len);
}

/* The first of the message's commands that was refused, or DECIDERS. */
static enum decider decider(const struct bsmtp_client *c)
{
	int by = BY_MAIL;

	while (by < DECIDERS && c->refused[by] == 0)
		by++;
	return (enum decider)by;
}

static void keep_refusal(struct bsmtp_client *c, enum decider by,
    const struct bsmtp_client_event *reply)
{
	if (decider(c) >= by)
		keep_verdict(c, reply);
	c->refused[by] = reply->code;
}

/* A refusal of MAIL that follows from one of the session, and is none of the message:
 * 530 after AUTH (RFC 4954 6), 503 after the opening (RFC 5321 4.1.4). */
static bool refused_with_session(const struct bsmtp_client *c)
{
	return (c->auth_refused && c->refused[BY_MAIL] == 530) ||
	    (c->opening_refused && c->refused[BY_MAIL] == 503);
}

/* Whether the message whose replies are read is still being written. */
static bool is_unended(const struct bsmtp_client *c)
{
	return c->writing && c->mails_due == 0;
}

/* The fate, by the first that was refused and by the code of the reply to the end, 0
 * where there is none:
 *
 *	first refused		end 2yz		end 4yz, 5yz	no reply
 *	MAIL			unknown (1)	as MAIL		as MAIL
 *	MAIL, with the session	unknown		unsent		unknown, or unsent if it has no end
 *	all recipients		as these	as these	as these
 *	DATA or a chunk		as that		as that		as that
 *	the end			-		as that		-
 *	nothing			delivered	-		unknown
 *
 * "As" one: deferred for 4yz, rejected for 5yz.  (1) As MAIL where the end went alone. */
static enum bsmtp_fate decide(const struct bsmtp_client *c, int end)
{
	enum decider by = decider(c);
	bool taken = end / 100 == 2;
	bool no_body = is_unended(c) || c->refused[BY_TEXT] != 0 || c->refused[BY_END] != 0;

	if (by == DECIDERS)
		return taken ? BSMTP_DELIVERED : BSMTP_UNKNOWN;
	if (by == BY_MAIL && taken && !c->bare)
		return BSMTP_UNKNOWN;
	if (by == BY_MAIL && refused_with_session(c))
		return no_body && c->rcpts_good == 0 ? BSMTP_UNSENT : BSMTP_UNKNOWN;
	return fate_of(c->refused[by]);
}

/* The message's fate, as far as the replies go.  Where they may all be those of the
 * next commands, it is known only if it makes no difference: they are all of one
 * kind, from the one before MAIL's to the end's; and what one of them puts off is not
 * refused for good. */
static void give_fate(struct bsmtp_client *c, struct bsmtp_client_event *event, int end)
{
	enum bsmtp_fate fate = decide(c, end);
	enum uniform uniform = MIXED;

	if (fate == BSMTP_DELIVERED && c->all_good)
		uniform = ALL_GOOD;
	else if (fate != BSMTP_DELIVERED && fate != BSMTP_UNKNOWN && c->all_bad)
		uniform = ALL_BAD;
	*event = c->verdict;
	event->type = BSMTP_CLIENT_MESSAGE;
	event->doubtful = c->alignment == LOST || (c->alignment == DOUBTFUL &&
	    (uniform == MIXED || (fate == BSMTP_REJECTED && c->put_off)));
	event->fate = event->doubtful ? BSMTP_UNKNOWN : fate;
	if (event->fate == BSMTP_UNKNOWN)
		event->code = 0;
	c->uniform = (unsigned char)uniform;
	c->judging = false;
}

static void begin_judging(struct bsmtp_client *c)
{
	memset(&c->verdict, 0, sizeof c->verdict);
	memset(c->refused, 0, sizeof c->refused);
	c->judging = true;
	c->bare = false;
	c->all_good = c->previous / 100 == 2;
	c->all_bad = c->previous / 100 > 3;
	c->put_off = c->previous / 100 == 4;
	c->before = c->previous;
	c->mail = 0;
	c->rcpts = c->rcpts_good = 0;
}

static void answer_mail(struct bsmtp_client *c, const struct bsmtp_client_event *event)
{
	c->mail = event->code;
	if (event->code / 100 != 2)
		keep_refusal(c, BY_MAIL, event);
}

/* Recipients decide if none was taken: by the first that was put off, else by the first
 * that was refused. */
static void answer_rcpt(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	bool first = c->refused[BY_RCPT] == 0;
	bool put_off = c->refused[BY_RCPT] / 100 == 5 && event->code / 100 == 4;

	event->type = BSMTP_CLIENT_RCPT;
	event->fate = fate_of(event->code);
	event->rcpt = c->rcpts++;
	if (event->fate == BSMTP_DELIVERED) {
		c->rcpts_good++;
		c->refused[BY_RCPT] = 0;
	} else if (c->rcpts_good == 0 && (first || put_off)) {
		keep_refusal(c, BY_RCPT, event);
	}
}

/* 354: who sent DATA and waits may go on. */
static void take_354(struct bsmtp_client *c)
{
	c->alignment = ALIGNED;
	if (c->state != CLIENT_DATA)
		return;
	c->state = CLIENT_BODY;
	if (c->rcpts_good > 0 && c->refused[BY_MAIL] == 0)
		return;
	/* RFC 2920 3.1: nobody is left, but the server wants an end. */
	end_of_data(c);
	c->bare = true;
	c->state = CLIENT_SKIP;
}

/* A 354, or the refusal of a body that was not sent. */
static void answer_data(struct bsmtp_client *c, const struct bsmtp_client_event *event)
{
	bool next = c->state == CLIENT_DATA || (c->state == CLIENT_BODY && c->due_count == 0);

	if (event->code / 100 == 3) {
		take_354(c);
		return;
	}
	keep_refusal(c, BY_TEXT, event);
	if (next)
		c->state = CLIENT_SKIP;
}

/* The reply to a chunk that is not the last.  Once one was refused the client MUST NOT
 * send more of the message (RFC 3030 2): what is framed already goes, then RSET. */
static void answer_chunk(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	if (!c->judging || event->code / 100 == 2)
		return;
	if (c->refused[BY_TEXT] == 0)
		keep_refusal(c, BY_TEXT, event);
	if (c->state != CLIENT_BODY || !is_unended(c))
		return;
	c->made = c->ready;
	c->chunk_open = c->writing = false;
	write_reset(c);
	give_fate(c, event, 0);
	c->state = CLIENT_SKIP;
}

/* The reply to the end of a body. */
static void answer_body(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	int code = event->code;

	if (code / 100 != 2)
		keep_refusal(c, BY_END, event);
	else if (decider(c) == DECIDERS)
		keep_verdict(c, event);
	if (code / 100 == 2 && c->due_count == 0 && !c->writing)
		c->unsure = false;
	give_fate(c, event, code);
}

/* RSET's: of a message that was abandoned it is the end; if it is refused the next MAIL
 * tells. */
static void answer_reset(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	if (event->code / 100 != 2 && !c->judging)
		event->type = BSMTP_CLIENT_NOTE;
	if (!c->judging)
		return;
	give_fate(c, event, 0);
	if (event->fate == BSMTP_UNKNOWN)
		event->fate = BSMTP_UNSENT;
}

void bsmtp_client_skipped(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	memset(event, 0, sizeof *event);
	c->state = CLIENT_MAIL;
	if (!c->writing)
		return;
	/* No body ended the transaction, so RSET must, whatever was offered. */
	if (c->refused[BY_MAIL] != 0)
		c->unsure = false;      /* there is none */
	else
		write_reset(c);
	give_fate(c, event, 0);
	c->writing = false;
}

static void refuse(struct bsmtp_client *c, struct bsmtp_client_event *event,
    enum bsmtp_error error)
{
	if (event->verb == BSMTP_VERB_AUTH)
		c->auth_refused = true;
	else
		c->opening_refused = true;
	if (c->state == CLIENT_MUTE)    /* this one only follows from that before */
		return;
	event->type = BSMTP_CLIENT_REFUSED;
	event->error = error;
	event->late = c->streamed;
	c->state = c->streamed ? CLIENT_MUTE : CLIENT_OVER;
}

static void answer_greeting(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	int class = event->code / 100;

	if (class >= 4) {
		refuse(c, event, class == 4 ? BSMTP_E_DEFERRED : BSMTP_E_REFUSED);
		return;
	}
	event->type = BSMTP_CLIENT_GREETING;
	if (c->state == CLIENT_GREETING)
		write_opening(c, mode_of(c)->opening);
}

/* The opening is answered, in the clear: BSMTP's 220 is followed by TLS, EHLO's reply
 * says whether STARTTLS may be asked for. */
static void begin_tls(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	if (event->verb == BSMTP_VERB_BSMTP) {
		event->type = BSMTP_CLIENT_SECURE;
		c->state = CLIENT_SECURING;
	} else if (c->offered & BSMTP_KEY_STARTTLS) {
		write_line(c, BSMTP_VERB_STARTTLS, slice_of("STARTTLS"));
		c->state = CLIENT_TLS;
	} else {
		fail(c, event, BSMTP_E_NO_TLS);
	}
}

static void answer_starttls(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	if (event->code / 100 != 2) {
		fail(c, event, BSMTP_E_NO_TLS);
		return;
	}
	event->type = BSMTP_CLIENT_SECURE;
	c->state = CLIENT_SECURING;
}

/* LOGIN's two questions; else the verdict. */
static void answer_auth(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	char line[1024];
	struct text t = { line, 0, sizeof line };

	if (event->code / 100 == 3 && c->auth_asked == AUTH_QUESTIONS) {
		fail(c, event, BSMTP_E_OUT_OF_PLACE);
	} else if (event->code / 100 == 3) {
		put_base64(&t, slice_of(c->auth_asked++ == 0 ? c->config->user : c->config->password));
		write_secret(c, BSMTP_VERB_AUTH, slice(line, t.len), "****");
	} else if (event->code / 100 == 2) {
		if (c->state == CLIENT_AUTH)
			c->state = CLIENT_MAIL;
	} else {
		refuse(c, event, event->code / 100 == 4 ? BSMTP_E_DEFERRED : BSMTP_E_AUTH);
	}
}

static void answer_opening(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	int class = event->code / 100;

	if (class == 2 && c->config->starttls && !c->secure) {
		begin_tls(c, event);
	} else if (class == 2) {
		event->type = BSMTP_CLIENT_OPENED;
		event->late = c->streamed;
		c->opened = true;
		if (!(c->offered & BSMTP_KEY_PIPELINING) && mode_of(c)->opening != BSMTP_VERB_BSMTP)
			c->lockstep = true;
		if (c->state == CLIENT_OPENING || c->state == CLIENT_GRACE)
			c->state = CLIENT_MAIL;
		if (c->state == CLIENT_MAIL && wants_auth(c) && mode_of(c)->opening != BSMTP_VERB_BSMTP)
			write_auth(c, event);
		if (c->state == CLIENT_HOLD)
			begin_body_text(c);
	} else if (class == 5 && event->verb == BSMTP_VERB_EHLO && mode_of(c)->waits_each) {
		write_opening(c, BSMTP_VERB_HELO);
	} else {
		refuse(c, event, class == 4 ? BSMTP_E_DEFERRED : BSMTP_E_REFUSED);
	}
}

/* RFC 9422 4: name=value, apart by spaces; others are passed over. */
static void learn_limits(struct bsmtp_client *c, struct bsmtp_slice list)
{
	struct bsmtp_parameter p;
	ptrdiff_t n;

	while ((n = bsmtp_parameter_parse(&p, list.at, list.len)) > 0) {
		uint64_t *limit = same(p.keyword, "MAILMAX") ? &c->mail_max :
		    same(p.keyword, "RCPTMAX") ? &c->rcpt_max : NULL;
		if (limit != NULL && p.value.len > 0)
			(void)bsmtp_number_parse(limit, p.value.at, p.value.len);
		list = slice(list.at + n, list.len - (size_t)n);
	}
}

static void learn_mechanisms(struct bsmtp_client *c, struct bsmtp_slice list)
{
	struct bsmtp_parameter p;
	ptrdiff_t n;

	while ((n = bsmtp_parameter_parse(&p, list.at, list.len)) > 0) {
		c->auth_plain = c->auth_plain || same(p.keyword, "PLAIN");
		c->auth_login = c->auth_login || same(p.keyword, "LOGIN");
		list = slice(list.at + n, list.len - (size_t)n);
	}
}

/* A keyword line of the opening's reply. */
static void learn(struct bsmtp_client *c, struct bsmtp_slice text)
{
	size_t n = 0;

	while (n < text.len && text.at[n] != ' ')
		n++;
	for (unsigned bit = 1; bit <= BSMTP_KEY_DSN; bit <<= 1)
		if (same(slice(text.at, n), bsmtp_keyword_name((enum bsmtp_keyword)bit)))
			c->offered |= bit;
	if (same(slice(text.at, n), "LIMITS"))
		learn_limits(c, slice(text.at + n, text.len - n));
	if (same(slice(text.at, n), "AUTH"))
		learn_mechanisms(c, slice(text.at + n, text.len - n));
}

static void answer_verb(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	switch (event->verb) {
	case BSMTP_VERB_CONNECT:
		answer_greeting(c, event);
		break;
	case BSMTP_VERB_HELO:
	case BSMTP_VERB_EHLO:
	case BSMTP_VERB_BSMTP:
		answer_opening(c, event);
		break;
	case BSMTP_VERB_MAIL:
		answer_mail(c, event);
		break;
	case BSMTP_VERB_RCPT:
		answer_rcpt(c, event);
		break;
	case BSMTP_VERB_DATA:
		answer_data(c, event);
		break;
	case BSMTP_VERB_BDAT:
		answer_chunk(c, event);
		break;
	case BSMTP_VERB_BODY:
		answer_body(c, event);
		break;
	case BSMTP_VERB_STARTTLS:
		answer_starttls(c, event);
		break;
	case BSMTP_VERB_AUTH:
		answer_auth(c, event);
		break;
	case BSMTP_VERB_QUIT:
		event->type = BSMTP_CLIENT_QUIT;
		c->state = CLIENT_OVER;
		break;
	case BSMTP_VERB_RSET:
		answer_reset(c, event);
		break;
	default:
		break;
	}
}

/* ---- which command a reply answers ---- */

/* Whether the first reply after the greeting is for certain that of the command after
 * the opening, which then has none: MAIL's enhanced status codes are 2.1.x (RFC 3463
 * 3.2), those of AUTH have their own (RFC 4954 4 and 6), and 221 is QUIT's. */
static bool answers_next(const struct bsmtp_client *c, int code)
{
	switch (due_verb(c, 1)) {
	case BSMTP_VERB_AUTH:
		return code == 235 || code == 334 || code == 530 || code == 535 || code == 538;
	case BSMTP_VERB_QUIT:
		return code == 221;
	default:
		return code / 100 == 2 && c->reply_statuses == MAIL_STATUS;
	}
}

/* Whether it is for certain the opening's: it has keywords, and no enhanced status code
 * on any line; or it says what MAIL cannot get. */
static bool answers_opening(const struct bsmtp_client *c, int code, unsigned lines)
{
	bool unknown = code == 500 || code == 502;

	return (code / 100 == 2 && lines > 1 && c->reply_statuses == NO_STATUS) ||
	    (unknown && due_verb(c, 1) == BSMTP_VERB_MAIL);
}

/* The first reply after the greeting, the stream having begun without it.  By exception
 * to the counting it is looked at; what cannot be told stays open. */
static void find_opening(struct bsmtp_client *c, int code, unsigned lines)
{
	if (answers_next(c, code)) {
		answered(c);
		if (c->state == CLIENT_GRACE)
			c->state = CLIENT_MAIL;         /* it would wait in vain */
	} else if (!answers_opening(c, code, lines)) {
		c->alignment = DOUBTFUL;
	}
}

/* In doubt: whether it is a 354 that cannot be the reply to the last RCPT, but that to
 * DATA after it. */
static bool shows_silence(const struct bsmtp_client *c, int code)
{
	return c->alignment == DOUBTFUL && code / 100 == 3 && due_verb(c, 0) == BSMTP_VERB_RCPT &&
	    due_verb(c, 1) == BSMTP_VERB_DATA;
}

/* Then what was counted for MAIL was the first recipient's reply, what was counted before
 * MAIL was MAIL's, and so on. */
static void move_replies(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	int others = c->refused[BY_RCPT];

	memset(event, 0, sizeof *event);
	if (c->refused[BY_MAIL] != 0)
		*event = c->verdict;
	event->type = BSMTP_CLIENT_MOVED;
	event->verb = c->verdict.verb = BSMTP_VERB_RCPT;
	event->code = c->mail;
	event->fate = fate_of(c->mail);
	c->rcpts++;
	c->rcpts_good += c->mail / 100 == 2;
	c->refused[BY_MAIL] = c->before / 100 > 3 ? c->before : 0;
	c->refused[BY_RCPT] = c->mail / 100 == 5 && others / 100 == 4 ? others : c->mail;
	if (c->rcpts_good > 0)
		c->refused[BY_RCPT] = 0;
	/* Where another decides now than did, its code is all there is. */
	if (c->refused[BY_MAIL] != 0)
		c->verdict = (struct bsmtp_client_event){ .verb = BSMTP_VERB_MAIL, .code = c->before };
	else if (c->refused[BY_RCPT] != c->verdict.code)
		c->verdict = (struct bsmtp_client_event){ .verb = BSMTP_VERB_RCPT,
			.code = c->refused[BY_RCPT] };
	answered(c);
	answered(c);
	take_354(c);
}

/* In doubt: a 221 that cannot be the reply to the last command before QUIT, but that to
 * QUIT.  Of the message it says nothing. */
static void pass_to_quit(struct bsmtp_client *c, int code)
{
	if (c->alignment != DOUBTFUL || code != 221 || c->due_count != 2 ||
	    due_verb(c, 1) != BSMTP_VERB_QUIT)
		return;
	answered(c);
	c->all_good = false;
}

/* A body was run as commands: its chunk is not known there, or its DATA was refused when
 * it had been written already. */
static bool runs_bodies(const struct bsmtp_client *c, const struct bsmtp_client_event *event)
{
	if (event->verb == BSMTP_VERB_DATA)
		return event->code / 100 != 3 && (c->due_count > 1 || c->body_octets > 0);
	return is_chunk_due(c) && (event->code == 500 || event->code == 502);
}

/* Why it cannot be the reply to the command that it is counted for; OK if it can.  421
 * and, but to QUIT, 221 are replies to no command: the server stops. */
static enum bsmtp_error misplaced(const struct bsmtp_client *c,
    const struct bsmtp_client_event *event)
{
	int class = event->code / 100;
	bool quitting = due_verb(c, c->due_count - 1) == BSMTP_VERB_QUIT;

	if (event->code == 421 && event->verb > BSMTP_VERB_BSMTP)
		return BSMTP_E_STOPPED;
	if (event->verb == BSMTP_VERB_QUIT)
		return event->code == 221 ? BSMTP_OK : BSMTP_E_MISCOUNTED;
	if (event->code == 221)
		return quitting ? BSMTP_E_MISCOUNTED : BSMTP_E_STOPPED;
	if (runs_bodies(c, event))
		return BSMTP_E_RUN;
	if (class == 1 || (class == 2 && event->verb == BSMTP_VERB_DATA))
		return BSMTP_E_OUT_OF_PLACE;
	if (class == 3 && event->verb != BSMTP_VERB_DATA && event->verb != BSMTP_VERB_AUTH)
		return BSMTP_E_OUT_OF_PLACE;
	return BSMTP_OK;
}

/* All replies are in, and in lockstep they tell how to go on: a message that is
 * refused already is not sent any further; and RSET cannot go together with the
 * MAIL that it makes room for. */
static void take_turn(struct bsmtp_client *c)
{
	bool refused = c->judging && decider(c) < DECIDERS;

	if (c->state == CLIENT_RCPT && c->judging && c->refused[BY_MAIL] != 0)
		c->state = CLIENT_SKIP;
	else if (c->state == CLIENT_BODY && c->bdat && !c->chunk_open && refused)
		c->state = CLIENT_SKIP;
	else if (c->state == CLIENT_MAIL && needs_reset(c))
		write_reset(c);
}

/* Keeps whether all replies are of one kind; a 354 is of neither, and 221 is no reply to a
 * message in either reading. */
static void note_kind(struct bsmtp_client *c, int code)
{
	c->all_good = c->all_good && code / 100 <= 3;
	c->all_bad = c->all_bad && (code / 100 >= 3 || code == 221);
	c->put_off = c->put_off || code / 100 == 4;
}

/* The last line of a reply is there: it answers what is due, by counting alone. */
static void answer(struct bsmtp_client *c, struct bsmtp_client_event *event, unsigned lines)
{
	enum bsmtp_error error;
	int code = event->code;
	bool firm = (c->uniform == ALL_GOOD && code / 100 == 2) ||
	    (c->uniform == ALL_BAD && code / 100 > 3);

	if (c->due_count == 0) {
		fail(c, event, code == 421 ? BSMTP_E_STOPPED : BSMTP_E_UNASKED);
		return;
	}
	if (due_verb(c, 0) == BSMTP_VERB_BSMTP && c->streamed)
		find_opening(c, code, lines);
	if (shows_silence(c, code)) {
		move_replies(c, event);
		return;
	}
	pass_to_quit(c, code);
	event->verb = due_verb(c, 0);
	error = misplaced(c, event);
	if (error != BSMTP_OK) {
		if (error == BSMTP_E_RUN)       /* whatever the chunks before it were answered */
			c->refused[BY_TEXT] = 0;
		fail(c, event, error);
		return;
	}
	answered(c);
	if (event->verb == BSMTP_VERB_MAIL)
		begin_judging(c);
	note_kind(c, code);
	c->uniform = MIXED;
	answer_verb(c, event);
	event->firm = firm;
	c->previous = code;
	if (c->lockstep && c->due_count == 0)
		take_turn(c);
}

/* What the enhanced status codes of a reply's lines say of it, with one line more. */
static enum statuses add_status(enum statuses before, struct bsmtp_slice status, bool first)
{
	bool mail = status.len > 4 && memcmp(status.at, "2.1.", 4) == 0;

	if (status.len == 0)
		return first ? NO_STATUS : before;
	return mail && (first || before != OTHER_STATUS) ? MAIL_STATUS : OTHER_STATUS;
}

/* Keywords have no enhanced status code in front; MAIL's reply, taken for BSMTP's, may. */
static bool may_learn(enum bsmtp_verb verb, const struct bsmtp_reply_line *line)
{
	return line->code / 100 == 2 && (verb == BSMTP_VERB_EHLO ||
	    (verb == BSMTP_VERB_BSMTP && line->status.len == 0));
}

/* One line of a reply; its event, when it is the last. */
static void reply_line(struct bsmtp_client *c, const struct bsmtp_reply_line *line, size_t len,
    struct bsmtp_client_event *event)
{
	enum bsmtp_verb verb = due_verb(c, 0);
	unsigned lines;

	c->reply_statuses = (unsigned char)add_status((enum statuses)c->reply_statuses, line->status,
	    c->reply_lines == 0);
	c->reply_len += len;
	if (c->reply_len > BSMTP_REPLY_MAX) {
		fail(c, event, BSMTP_E_REPLY_LONG);
		return;
	}
	if (c->reply_lines++ == 0)
		c->reply_code = line->code;
	else if (line->code != c->reply_code) {
		fail(c, event, BSMTP_E_REPLY);
		return;
	} else if (may_learn(verb, line))
		learn(c, line->text);
	if (line->more)
		return;
	lines = c->reply_lines;
	c->reply_lines = 0;
	c->reply_len = 0;
	event->code = line->code;
	event->status = line->status;
	event->text = line->text;
	answer(c, event, lines);
}

/* Gathers a line that came in pieces; returns the octets taken. */
static size_t gather(char *line, size_t *have, size_t cap, const char *in, size_t len)
{
	size_t n = min_size(len, cap - *have);
	const char *lf = n > 0 ? memchr(in, '\n', n) : NULL;

	if (lf != NULL)
		n = (size_t)(lf - in) + 1;
	if (n > 0)
		memcpy(line + *have, in, n);
	*have += n;
	return n;
}

/* Begins like a reply line, and has no end. */
static bool is_endless(const char *at, size_t len)
{
	struct bsmtp_reply_line line;

	return len >= BSMTP_REPLY_LINE_MAX && memchr(at, '\n', BSMTP_REPLY_LINE_MAX) == NULL &&
	    bsmtp_reply_line_parse(&line, at, 4) == BSMTP_MORE;
}

size_t bsmtp_client_in(struct bsmtp_client *c, const char *in, size_t len,
    struct bsmtp_client_event *event)
{
	size_t used = 0;

	memset(event, 0, sizeof *event);
	while (used < len && event->type == BSMTP_CLIENT_NONE) {
		struct bsmtp_reply_line line;
		const char *at = in + used;
		size_t take = 0;
		ptrdiff_t n;

		if (c->state == CLIENT_OVER)
			return len;
		n = c->line_len == 0 ? bsmtp_reply_line_parse(&line, at, len - used) : BSMTP_MORE;
		if (n == BSMTP_MORE) {
			take = gather(c->line, &c->line_len, sizeof c->line, at, len - used);
			at = c->line;
			n = bsmtp_reply_line_parse(&line, at, c->line_len);
		}
		used += n > 0 && take == 0 ? (size_t)n : take;
		if (n == BSMTP_MORE)
			continue;
		if (n == BSMTP_BAD) {
			tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_REPLY,
			    take > 0 ? slice(c->line, c->line_len) : slice(at, min_size(len - used, 80)), 0);
			fail(c, event, is_endless(at, take > 0 ? c->line_len : len - used) ?
			    BSMTP_E_REPLY_LONG : BSMTP_E_REPLY);
			return len;
		}
		tap_line(c->config->tap, c->config->tap_context, BSMTP_TAP_REPLY,
		    slice(at, (size_t)n - 2), 0);
		c->line_len = 0;
		reply_line(c, &line, (size_t)n, event);
		if (c->reply_lines == 0)
			break;          /* a reply is whole: the caller may write again */
	}
	return used;
}

void bsmtp_client_grace_over(struct bsmtp_client *c)
{
	if (c->state == CLIENT_GRACE)
		c->state = CLIENT_MAIL;
}

void bsmtp_client_secured(struct bsmtp_client *c, bool agreed)
{
	bool first = c->state != CLIENT_SECURING;       /* TLS was there before all else */

	c->secure = true;
	if (!first) {
		c->made = c->ready = c->sent = 0;
		c->due_count = c->mails_due = 0;
		c->opened = false;
		c->offered = 0;
		write_opening(c, mode_of(c)->opening);
	}
	if (agreed && c->state == CLIENT_GRACE)
		c->state = CLIENT_MAIL;
	if (agreed)
		c->offered |= BSMTP_KEY_BSMTP;  /* and all that comes with it */
	else if (!c->opened)
		c->offered &= ~(unsigned)BSMTP_KEY_BSMTP;
}

void bsmtp_client_closed(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	bool opening = !c->streamed && (c->state == CLIENT_GREETING ||
	    c->state == CLIENT_OPENING || c->state == CLIENT_GRACE || c->state == CLIENT_TLS);

	memset(event, 0, sizeof *event);
	if (c->state == CLIENT_OVER || (c->state == CLIENT_MUTE && c->due_count == 0))
		return;
	if (opening && mode_of(c)->opening == BSMTP_VERB_BSMTP)
		refuse(c, event, BSMTP_E_CLOSED);
	else
		fail(c, event, BSMTP_E_CLOSED);
	c->state = CLIENT_OVER;
}

bool bsmtp_client_unsettled(struct bsmtp_client *c, struct bsmtp_client_event *event)
{
	bool more_rcpts;

	memset(event, 0, sizeof *event);
	c->state = CLIENT_OVER;
	while (!c->judging) {
		if (c->due_count == 0)
			return false;
		if (due_verb(c, 0) == BSMTP_VERB_MAIL)
			begin_judging(c);
		answered(c);
	}
	/* Recipients that were not written yet, or have no reply, might have been taken. */
	more_rcpts = c->due_count > 0 ? due_verb(c, 0) == BSMTP_VERB_RCPT :
	    c->writing && !c->addressed;
	if (more_rcpts)
		c->refused[BY_RCPT] = 0;
	give_fate(c, event, 0);
	return true;
}

void bsmtp_client_limits(const struct bsmtp_client *c, uint64_t *mails, uint64_t *rcpts)
{
	*mails = c->mail_max;
	*rcpts = c->rcpt_max;
}

size_t bsmtp_client_owed(const struct bsmtp_client *c)
{
	return c->due_count;
}

enum bsmtp_verb bsmtp_client_awaits(const struct bsmtp_client *c)
{
	return due_verb(c, 0);
}

uint64_t bsmtp_client_position(const struct bsmtp_client *c)
{
	return c->sent_total + (c->made - c->sent);
}

uint64_t bsmtp_client_sent_total(const struct bsmtp_client *c)
{
	return c->sent_total;
}

unsigned bsmtp_client_offered(const struct bsmtp_client *c)
{
	return c->offered;
}

unsigned bsmtp_client_usable(const struct bsmtp_client *c)
{
	return client_keys(c);
}

bool bsmtp_client_in_lockstep(const struct bsmtp_client *c)
{
	return c->lockstep;
}

uint64_t bsmtp_client_strays(const struct bsmtp_client *c)
{
	return c->strays + c->encoder.strays;
}

/* ==== 6 server engine ==================================================== */

enum server_state {
	SERVER_CONNECT,         /* the greeting is to be given */
	SERVER_COMMAND,
	SERVER_LONG,            /* inside a line too long: until its LF */
	SERVER_DATA,            /* inside a body, until CRLF.CRLF */
	SERVER_CHUNK,           /* inside a body, for so many octets */
	SERVER_TLS,             /* what follows is TLS: bsmtp_server_secured() */
	SERVER_QUESTION,        /* a line that answers AUTH's 334 */
	SERVER_VERDICT,         /* nothing is read before AUTH is settled */
	SERVER_ENDED
};

/* Every reply of the server; up to INTERNAL in bsmtp.h's order. */
enum {
	ANSWER_GREETING = BSMTP_ANSWER_INTERNAL, ANSWER_HELO, ANSWER_EHLO, ANSWER_MAIL,
	ANSWER_RCPT, ANSWER_DATA, ANSWER_CHUNK, ANSWER_RSET, ANSWER_NOOP, ANSWER_VRFY,
	ANSWER_HELP, ANSWER_QUIT, ANSWER_CUSTOM, ANSWER_DROP, ANSWER_SILENT, ANSWER_UNKNOWN,
	ANSWER_NOT_HERE, ANSWER_FOREIGN, ANSWER_LONG, ANSWER_NEWLINE, ANSWER_OCTET,
	ANSWER_BAD_HELO, ANSWER_BAD_PATH, ANSWER_BAD_RCPT, ANSWER_BAD_PARAMETER, ANSWER_NO_PARAMETER,
	ANSWER_BAD_BDAT, ANSWER_NEEDS_UTF8, ANSWER_NO_HELLO, ANSWER_NESTED, ANSWER_NO_MAIL,
	ANSWER_TLS, ANSWER_NEEDS_TLS, ANSWER_HAS_TLS, ANSWER_AUTH, ANSWER_AUTHED, ANSWER_ASK_NAME,
	ANSWER_ASK_PASSWORD, ANSWER_ASK, ANSWER_NO_MECHANISM, ANSWER_BAD_AUTH, ANSWER_NEEDS_AUTH,
	ANSWER_EARLY, ANSWER_EARLY_AUTH, ANSWER_NO_RCPT, ANSWER_TOO_BIG, ANSWER_BARE_NEWLINE, ANSWER_NO_SMTP,
	ANSWERS
};

static const struct {
	const char *code, *text;
} answers[ANSWERS] = {
	[BSMTP_ANSWER_STORED] = { "250", "2.0.0 stored" },
	[BSMTP_ANSWER_NO_SPACE] = { "452", "4.3.1 no space to store it" },
	[BSMTP_ANSWER_STORE_FAILED] = { "451", "4.3.0 it could not be stored" },
	[BSMTP_ANSWER_NOT_TAKEN] = { "554", "5.3.0 it was not accepted" },
	[BSMTP_ANSWER_LOOPS] = { "554", "5.4.6 too many hops: it goes in a circle" },
	[BSMTP_ANSWER_TOO_MANY] = { "452", "4.5.3 too many recipients" },
	[BSMTP_ANSWER_DASH] = { "553", "5.1.3 a recipient that begins with - is not taken here" },
	[BSMTP_ANSWER_STOPPING] = { "421", "4.3.2 shutting down" },
	[BSMTP_ANSWER_TIMEOUT] = { "421", "4.4.2 silent for too long" },
	[BSMTP_ANSWER_BUSY] = { "421", "4.7.0 too many connections" },
	[BSMTP_ANSWER_NOT_ALLOWED] = { "554", "5.7.1 not by prearrangement" },
	[ANSWER_GREETING] = { "220", NULL },
	[ANSWER_HELO] = { "250", NULL },
	[ANSWER_EHLO] = { "250", NULL },
	[ANSWER_MAIL] = { "250", "2.1.0 sender ok" },
	[ANSWER_RCPT] = { "250", "2.1.5 recipient ok" },
	[ANSWER_DATA] = { "354", "end with <CRLF>.<CRLF>" },
	[ANSWER_CHUNK] = { "250", "2.0.0 chunk ok" },
	[ANSWER_RSET] = { "250", "2.0.0 ok" },
	[ANSWER_NOOP] = { "250", "2.0.0 ok" },
	[ANSWER_VRFY] = { "252", "2.5.2 send it and see" },
	[ANSWER_HELP] = { "214", "2.0.0 see RFC 5321, and bsmtp(7) for BSMTP" },
	[ANSWER_QUIT] = { "221", "2.0.0 bye" },
	[ANSWER_CUSTOM] = { NULL, NULL },
	[ANSWER_DROP] = { NULL, NULL },
	[ANSWER_SILENT] = { NULL, NULL },
	[ANSWER_UNKNOWN] = { "500", "5.5.1 command not known" },
	[ANSWER_NOT_HERE] = { "502", "5.5.1 not implemented" },
	[ANSWER_FOREIGN] = { "554", "5.5.0 this is no web server" },
	[ANSWER_LONG] = { "500", "5.5.2 line too long" },
	[ANSWER_NEWLINE] = { "500", "5.5.2 lines end in CRLF" },
	[ANSWER_OCTET] = { "500", "5.5.2 control character in the line" },
	[ANSWER_BAD_HELO] = { "501", "5.5.4 a domain or an address literal is needed" },
	[ANSWER_BAD_PATH] = { "501", "5.1.7 not an address: <local-part@domain> is needed" },
	[ANSWER_BAD_RCPT] = { "501", "5.1.3 not an address: <local-part@domain> is needed" },
	[ANSWER_BAD_PARAMETER] = { "501", "5.5.4 parameter malformed" },
	[ANSWER_NO_PARAMETER] = { "555", "5.5.4 parameter not known" },
	[ANSWER_BAD_BDAT] = { "501", "5.5.4 BDAT needs a length: closing, for what follows it has no end" },
	[ANSWER_NEEDS_UTF8] = { "553", "5.6.7 the address needs SMTPUTF8" },
	[ANSWER_NO_HELLO] = { "503", "5.5.1 say EHLO or BSMTP first" },
	[ANSWER_NESTED] = { "503", "5.5.1 a transaction is open: RSET first" },
	[ANSWER_NO_MAIL] = { "503", "5.5.1 no MAIL was accepted" },
	[BSMTP_ANSWER_DUPLICATE] = { "250", "2.0.0 duplicate, already stored" },
	[BSMTP_ANSWER_UNDER_WAY] = { "451", "4.3.0 the same TRANSID is under way" },
	[ANSWER_EARLY] = { "450", "4.7.0 this may be a replay: not without TRANSID" },
	[ANSWER_EARLY_AUTH] = { "454", "4.7.0 not in early data" },
	[BSMTP_ANSWER_AUTH_FAILED] = { "535", "5.7.8 not accepted" },
	[BSMTP_ANSWER_AUTH_LATER] = { "454", "4.7.0 not to be found out now" },
	[ANSWER_TLS] = { "220", "2.0.0 ready for TLS" },
	[ANSWER_NEEDS_TLS] = { "530", "5.7.0 only under TLS" },
	[ANSWER_HAS_TLS] = { "503", "5.5.1 this is TLS already" },
	[ANSWER_AUTH] = { "235", "2.7.0 accepted" },
	[ANSWER_AUTHED] = { "503", "5.5.1 not now" },
	[ANSWER_ASK] = { "334", "" },
	[ANSWER_ASK_NAME] = { "334", "VXNlcm5hbWU6" },
	[ANSWER_ASK_PASSWORD] = { "334", "UGFzc3dvcmQ6" },
	[ANSWER_NO_MECHANISM] = { "504", "5.5.4 PLAIN or LOGIN" },
	[ANSWER_BAD_AUTH] = { "501", "5.5.2 no such response, or cancelled" },
	[ANSWER_NEEDS_AUTH] = { "530", "5.7.0 authentication is required" },
	[ANSWER_NO_RCPT] = { "554", "5.5.1 no valid recipients" },
	[ANSWER_TOO_BIG] = { "552", "5.3.4 message too big" },
	[ANSWER_BARE_NEWLINE] = { "554", "5.6.0 bare CR or LF at offset " },
	[ANSWER_NO_SMTP] = { "550", "5.7.1 BSMTP only" },
};

/* ---- faults on request ---- */

/* * and ?, any case; iterative, so that no pattern costs more than len * len. */
static bool glob_match(struct bsmtp_slice glob, struct bsmtp_slice s)
{
	size_t g = 0, i = 0, star = glob.len, mark = 0;

	while (i < s.len) {
		if (g < glob.len && glob.at[g] == '*') {
			star = g++;
			mark = i;
		} else if (g < glob.len && (glob.at[g] == '?' || lower(glob.at[g]) == lower(s.at[i]))) {
			g++;
			i++;
		} else if (star < glob.len) {
			g = star + 1;
			i = ++mark;
		} else {
			return false;
		}
	}
	while (g < glob.len && glob.at[g] == '*')
		g++;
	return g == glob.len;
}

static const char *fault_action(struct bsmtp_fault *f, struct bsmtp_slice action,
    struct bsmtp_slice *time)
{
	struct bsmtp_slice word = slice(action.at, min_size(action.len, 5));

	f->action = BSMTP_FAULT_REPLY;
	if (same(action, "drop")) {
		f->action = BSMTP_FAULT_DROP;
	} else if (same(action, "silent")) {
		f->action = BSMTP_FAULT_SILENT;
	} else if (same(word, "delay") && action.len > 6 && action.at[5] == ' ') {
		f->action = BSMTP_FAULT_DELAY;
		*time = trim(slice(action.at + 6, action.len - 6));
	} else {
		if (action.len < 3 || action.at[0] < '2' || action.at[0] > '5' ||
		    !is_digit(action.at[1]) || !is_digit(action.at[2]) ||
		    (action.len > 3 && action.at[3] != ' '))
			return "the action is a reply (550 text), drop, silent or delay TIME";
		if (action.len > 500)
			return "the reply is too long";
		for (size_t i = 0; i < action.len; i++)
			if (action.at[i] >= 0 && action.at[i] < ' ')
				return "the reply holds a control character";
		f->reply = action;
	}
	return NULL;
}

const char *bsmtp_fault_parse(struct bsmtp_fault *f, struct bsmtp_slice spec,
    struct bsmtp_slice *time)
{
	const char *equals = spec.len > 0 ? memchr(spec.at, '=', spec.len) : NULL;
	struct bsmtp_slice head, verb;
	size_t n = 0;

	memset(f, 0, sizeof *f);
	*time = slice("", 0);
	if (equals == NULL)
		return "it has the form VERB[#N][ GLOB]=ACTION";
	head = slice(spec.at, (size_t)(equals - spec.at));
	while (n < head.len && head.at[n] != '#' && head.at[n] != ' ')
		n++;
	verb = slice(head.at, n);
	f->verb = BSMTP_VERBS;
	for (int v = 0; v < BSMTP_VERB_FOREIGN; v++)
		if (same(verb, bsmtp_verb_name((enum bsmtp_verb)v)))
			f->verb = (enum bsmtp_verb)v;
	if (f->verb == BSMTP_VERBS)
		return "the verb is not known (a command, CONNECT or BODY)";
	if (n < head.len && head.at[n] == '#') {
		ptrdiff_t used = bsmtp_number_parse(&f->nth, head.at + n + 1, head.len - n - 1);
		if (used <= 0 || f->nth == 0)
			return "a number from 1 on is needed behind #";
		n += 1 + (size_t)used;
	}
	f->glob = trim(slice(head.at + n, head.len - n));
	if (f->glob.len > 0 && head.at[n] != ' ')
		return "a space is needed before the pattern";
	return fault_action(f, trim(slice(equals + 1, (size_t)(spec.at + spec.len - equals) - 1)), time);
}

static struct bsmtp_fault *find_fault(struct bsmtp_server *s, enum bsmtp_verb verb,
    struct bsmtp_slice argument)
{
	for (size_t i = 0; i < s->config->fault_count; i++) {
		struct bsmtp_fault *f = &s->config->faults[i];
		if (f->verb != verb || (f->glob.len > 0 && !glob_match(f->glob, argument)))
			continue;
		if (++f->seen == f->nth || f->nth == 0)
			return f;
	}
	return NULL;
}

/* ---- replies held ---- */

static struct bsmtp_held *held_at(const struct bsmtp_server *s, uint64_t ticket)
{
	return &s->held[ticket % s->held_size];
}

static uint64_t owe(struct bsmtp_server *s, unsigned answer, uint64_t argument)
{
	*held_at(s, s->held_next) = (struct bsmtp_held){ argument, (unsigned short)answer, false };
	return s->held_next++;
}

static void end_with(struct bsmtp_server *s, enum bsmtp_end end)
{
	s->state = SERVER_ENDED;
	if (s->end == BSMTP_END_OPEN)
		s->end = (unsigned char)end;
}

/* What a fault puts in place of a reply. */
static unsigned fault_answer(struct bsmtp_server *s, const struct bsmtp_fault *f,
    uint64_t *argument)
{
	*argument = (uint64_t)(f - s->config->faults);
	return f->action == BSMTP_FAULT_DROP ? ANSWER_DROP :
	    f->action == BSMTP_FAULT_SILENT ? ANSWER_SILENT : ANSWER_CUSTOM;
}

/* Whether the peer may open with BSMTP: who is allowed, and who may yet show by AUTH
 * that he is. */
static bool may_open(const struct bsmtp_server *s)
{
	bool private = (s->flags & (BSMTP_PEER_TLS | BSMTP_PEER_LOCAL)) != 0;

	return (s->flags & BSMTP_PEER_ALLOWED) || ((s->flags & BSMTP_PEER_GUEST) &&
	    s->config->auth && private);
}

/* Whether BSMTP would be refused, for who the peer is or for the want of TLS. */
static bool refuses_opening(const struct bsmtp_server *s)
{
	return !may_open(s) || (s->config->require_tls && !(s->flags & BSMTP_PEER_TLS));
}

static unsigned offered(const struct bsmtp_server *s)
{
	unsigned keys = s->config->keywords;
	bool private = (s->flags & (BSMTP_PEER_TLS | BSMTP_PEER_LOCAL)) != 0;
	bool taken = s->config->opening == BSMTP_OPENING_ACCEPT ||
	    s->config->opening == BSMTP_OPENING_SILENT;

	if (refuses_opening(s) || !taken)
		keys &= ~(unsigned)BSMTP_KEY_BSMTP;
	if (!s->config->starttls || (s->flags & BSMTP_PEER_TLS))
		keys &= ~(unsigned)BSMTP_KEY_STARTTLS;
	if (!s->config->auth || !private || s->authed)
		keys &= ~(unsigned)BSMTP_KEY_AUTH;
	return keys;
}

static void put_reply(struct text *t, const char *code, bool more, const char *text)
{
	put_string(t, code);
	put_string(t, more ? "-" : " ");
	put_string(t, text);
	put_string(t, "\r\n");
}

static void put_ehlo(struct bsmtp_server *s, struct text *t, unsigned keys)
{
	put_reply(t, "250", keys != 0, s->config->hostname);
	for (unsigned bit = 1; bit <= keys; bit <<= 1) {
		if (!(keys & bit))
			continue;
		put_string(t, (keys & ~(bit * 2 - 1)) ? "250-" : "250 ");
		put_string(t, bsmtp_keyword_name((enum bsmtp_keyword)bit));
		if (bit == BSMTP_KEY_SIZE) {
			put_string(t, " ");
			put_number(t, s->config->max_size);
		} else if (bit == BSMTP_KEY_LIMITS) {
			put_string(t, " RCPTMAX=");
			put_number(t, s->config->max_recipients);
		} else if (bit == BSMTP_KEY_AUTH) {
			put_string(t, " PLAIN LOGIN");
		}
		put_string(t, "\r\n");
	}
}

static void put_answer(struct bsmtp_server *s, struct text *t, const struct bsmtp_held *h)
{
	switch (h->answer) {
	case ANSWER_GREETING:
		put_string(t, "220 ");
		put_string(t, s->config->hostname);
		put_string(t, " ESMTP bsmtp\r\n");
		break;
	case ANSWER_HELO:
		put_reply(t, "250", false, s->config->hostname);
		break;
	case ANSWER_EHLO:
		put_ehlo(s, t, (unsigned)h->argument);
		break;
	case ANSWER_CUSTOM:
		put(t, s->config->faults[h->argument].reply);
		put_string(t, "\r\n");
		break;
	case ANSWER_BARE_NEWLINE:
		put_string(t, "554 5.6.0 bare CR or LF at offset ");
		put_number(t, h->argument);
		put_string(t, "\r\n");
		break;
	case ANSWER_DROP:
	case ANSWER_SILENT:
		break;
	default:
		put_reply(t, answers[h->answer].code, false, answers[h->answer].text);
	}
}

static void tap_replies(struct bsmtp_server *s, struct bsmtp_slice text)
{
	const char *lf;

	while (s->config->tap != NULL && text.len > 0) {
		lf = memchr(text.at, '\n', text.len);
		size_t n = (size_t)(lf - text.at) + 1;
		s->config->tap(s->tap_context, BSMTP_TAP_REPLY, slice(text.at, n - 2), 0);
		text = slice(text.at + n, text.len - n);
	}
}

size_t bsmtp_server_out(struct bsmtp_server *s, char *out, size_t cap, bool *closed)
{
	size_t made = 0;

	while (!s->dropped && s->held_first < s->held_next && cap - made >= BSMTP_SERVER_OUT_MIN) {
		const struct bsmtp_held *h = held_at(s, s->held_first);
		struct text t = { out + made, 0, cap - made };
		if (h->open)
			break;
		put_answer(s, &t, h);
		tap_replies(s, slice(out + made, t.len));
		made += t.len;
		if (h->answer == ANSWER_DROP) {
			s->dropped = true;
			end_with(s, BSMTP_END_ERROR);
		}
		s->held_first++;
	}
	*closed = s->dropped;
	return made;
}

void bsmtp_server_settle(struct bsmtp_server *s, uint64_t ticket, enum bsmtp_answer answer)
{
	struct bsmtp_held *h = held_at(s, ticket);

	if (answer != BSMTP_ANSWER_STORED)
		h->answer = (unsigned short)answer;
	h->open = false;
	if (s->state != SERVER_VERDICT || ticket != s->auth_ticket)
		return;
	memset(s->line, 0, sizeof s->line);     /* the secret */
	s->authed = answer == BSMTP_ANSWER_STORED;
	s->state = SERVER_COMMAND;
}

size_t bsmtp_server_owed(const struct bsmtp_server *s)
{
	return (size_t)(s->held_next - s->held_first);
}

void bsmtp_server_lend(struct bsmtp_server *s, struct bsmtp_held *held, size_t held_size)
{
	for (uint64_t i = s->held_first; i < s->held_next; i++)
		held[i % held_size] = *held_at(s, i);
	s->held = held;
	s->held_size = held_size;
}

/* ---- transactions ---- */

static void reset_transaction(struct bsmtp_server *s)
{
	s->mail_tried = s->mail_ok = s->utf8 = s->oversize = s->chunks = false;
	s->rcpts = s->rcpts_new = 0;
	s->verdict = 0;
	s->size = 0;
	memset(&s->decoder, 0, sizeof s->decoder);
	memset(&s->newlines, 0, sizeof s->newlines);
	s->newlines.normalize = s->config->normalize;
}

/* Forgets the transaction under way, and tells the caller if it knew of one. */
static void abort_transaction(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	if (s->mail_ok)
		*event = (struct bsmtp_server_event){ .type = BSMTP_SERVER_ABORT };
	reset_transaction(s);
}

static void condemn(struct bsmtp_server *s, unsigned answer, uint64_t argument)
{
	if (s->verdict != 0)
		return;
	s->verdict = (unsigned short)answer;
	s->verdict_argument = argument;
}

/* Every recipient is known to have this message: its body is passed over, whatever it
 * holds. */
static bool is_duplicate(const struct bsmtp_server *s)
{
	return s->verdict == 0 && s->rcpts > 0 && s->rcpts_new == 0;
}

static bool is_refusal(const struct bsmtp_fault *f)
{
	return f->action == BSMTP_FAULT_REPLY && f->reply.at[0] > '3';
}

/* The body is whole; nothing of what was refused before cut it short. */
static void finish_body(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	struct bsmtp_fault *f = NULL;
	uint64_t argument = 0;
	unsigned answer = BSMTP_ANSWER_STORED;
	bool duplicate = is_duplicate(s);

	if (!s->resumed)
		tap_line(s->config->tap, s->tap_context, BSMTP_TAP_BODY, slice("", 0), s->wire);
	s->wire = 0;
	s->state = SERVER_COMMAND;
	if (s->newlines.bad && !s->config->normalize)
		condemn(s, ANSWER_BARE_NEWLINE, s->newlines.bad_at);
	if (s->verdict == 0 && !s->resumed) {
		f = find_fault(s, BSMTP_VERB_BODY, slice("", 0));
		if (f != NULL && f->action == BSMTP_FAULT_DELAY) {
			event->type = BSMTP_SERVER_DELAY;
			event->number = f->delay_ms;
			s->state = SERVER_CHUNK;        /* of no more octets: comes here again */
			s->chunk = 0;
			s->last = s->resumed = true;
			return;
		}
	}
	s->resumed = false;
	if (f != NULL && !(duplicate && is_refusal(f))) {
		answer = fault_answer(s, f, &argument);
		if (f->action == BSMTP_FAULT_REPLY && f->reply.at[0] != '2')
			condemn(s, answer, argument);
	}
	if (s->verdict != 0) {
		owe(s, s->verdict, s->verdict_argument);
		abort_transaction(s, event);
		return;
	}
	event->type = BSMTP_SERVER_MESSAGE;
	event->number = s->size;
	event->ticket = owe(s, answer, argument);
	held_at(s, event->ticket)->open = true;
	reset_transaction(s);
}

static void begin_body(struct bsmtp_server *s)
{
	if (!s->mail_ok)
		condemn(s, ANSWER_NO_MAIL, 0);
	else if (s->rcpts == 0)
		condemn(s, ANSWER_NO_RCPT, 0);
}

/* Octets of the body, as they are in the message: counted, watched, given. */
static size_t body_text(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	uint64_t left = s->config->max_size > s->size ? s->config->max_size - s->size : 0;
	size_t used;

	if (is_duplicate(s)) {
		s->size += len;
		return len;
	}
	if (left == 0 && len > 0)
		condemn(s, ANSWER_TOO_BIG, 0);
	else if (left < len)            /* give what fits, wherever the input is cut */
		len = (size_t)left;
	used = bsmtp_newlines(&s->newlines, in, len, &event->text);
	s->size += used;
	if (s->verdict == 0 && event->text.len > 0)
		event->type = BSMTP_SERVER_TEXT;
	return used;
}

/* Before the end of a body: a CR that was withheld. */
static bool body_tail(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	bsmtp_newlines_end(&s->newlines, &event->text);
	if (event->text.len == 0 || s->verdict != 0)
		return false;
	event->type = BSMTP_SERVER_TEXT;
	return true;
}

/* The end of a body is reached, its last octets given. */
static void end_of_body(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	if (!body_tail(s, event))
		finish_body(s, event);
}

/* One step in a body under DATA.  When the newlines took less than the decoder
 * gave, it is set back: a decoder does not care where its input is cut. */
static size_t in_data(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	struct bsmtp_decoder before = s->decoder;
	struct bsmtp_slice text;
	size_t used, taken;

	if (s->decoder.ended) {
		end_of_body(s, event);
		return 0;
	}
	used = bsmtp_decode(&s->decoder, in, len, &text);
	taken = body_text(s, text.at, text.len, event);
	if (taken < text.len) {
		s->decoder = before;
		used = taken == 0 ? 0 :
		    bsmtp_decode(&s->decoder, in, (size_t)(text.at - in) + taken, &text);
	}
	s->wire += used;
	return used;
}

/* One step in a body under BDAT; a chunk of no octets ends at once. */
static size_t in_chunk(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	size_t used;

	if (s->chunk > 0) {
		used = body_text(s, in, len < s->chunk ? len : (size_t)s->chunk, event);
		s->chunk -= used;
		s->wire += used;
		return used;
	}
	if (s->last) {
		end_of_body(s, event);
		return 0;
	}
	tap_line(s->config->tap, s->tap_context, BSMTP_TAP_BODY, slice("", 0), s->wire);
	s->wire = 0;
	owe(s, s->verdict != 0 ? s->verdict : ANSWER_CHUNK, s->verdict_argument);
	s->state = SERVER_COMMAND;
	return 0;
}

/* ---- verbs ---- */

struct call {                   /* one command, being carried out */
	enum bsmtp_verb verb;
	struct bsmtp_slice argument;            /* behind the verb and a space */
	unsigned custom;        /* 0, or the answer of a fault in place of 2yz */
	uint64_t custom_argument;
	struct bsmtp_server_event *event;
};

/* The 2yz of a command, or what a fault put in its place. */
static void accept_call(struct bsmtp_server *s, const struct call *call, unsigned answer)
{
	if (call->custom != 0)
		owe(s, call->custom, call->custom_argument);
	else    /* what EHLO offers is settled when it is heard: AUTH may follow before it is told */
		owe(s, answer, answer == ANSWER_EHLO ? offered(s) : 0);
}

/* What follows the command's CRLF is TLS, and no octet of it is looked at here. */
static void start_tls(struct bsmtp_server *s, struct call *call)
{
	s->aborting = s->mail_ok;       /* told under TLS, for this event is taken */
	reset_transaction(s);
	owe(s, ANSWER_TLS, 0);
	call->event->type = BSMTP_SERVER_STARTTLS;
	s->state = SERVER_TLS;
}

static void act_starttls(struct bsmtp_server *s, struct call *call)
{
	if (s->flags & BSMTP_PEER_TLS)
		owe(s, ANSWER_HAS_TLS, 0);
	else if (!(offered(s) & BSMTP_KEY_STARTTLS))
		owe(s, ANSWER_NOT_HERE, 0);
	else if (trim(call->argument).len > 0)
		owe(s, ANSWER_BAD_PARAMETER, 0);
	else
		start_tls(s, call);
}

static bool names_starttls(struct bsmtp_slice parameters)
{
	struct bsmtp_parameter p;
	ptrdiff_t n;

	for (; (n = bsmtp_parameter_parse(&p, parameters.at, parameters.len)) > 0;
	    parameters = slice(parameters.at + n, parameters.len - (size_t)n))
		if (same(p.keyword, "STARTTLS"))
			return true;
	return false;
}

/* BSMTP's opening-params: STARTTLS is the one there is, and it stands alone.  What
 * follows it is TLS, so that nothing is looked at where it is refused. */
static void open_with(struct bsmtp_server *s, struct call *call, struct bsmtp_slice parameters)
{
	if (same(trim(parameters), "STARTTLS") && (offered(s) & BSMTP_KEY_STARTTLS)) {
		start_tls(s, call);
		call->event->number = 1;
		return;
	}
	owe(s, ANSWER_NO_PARAMETER, 0);
	if (names_starttls(parameters))
		end_with(s, BSMTP_END_REFUSED);
}

static void act_hello(struct bsmtp_server *s, struct call *call)
{
	struct bsmtp_slice name = trim(call->argument);
	size_t n = 0;

	while (n < name.len && name.at[n] != ' ')
		n++;
	if (!bsmtp_domain_valid(slice(name.at, n), true) ||
	    (n < name.len && call->verb != BSMTP_VERB_BSMTP)) {
		owe(s, ANSWER_BAD_HELO, 0);
		return;
	}
	if (n < name.len) {
		open_with(s, call, slice(name.at + n, name.len - n));
		return;
	}
	if (call->verb == BSMTP_VERB_BSMTP && refuses_opening(s)) {
		owe(s, s->config->require_tls && !(s->flags & BSMTP_PEER_TLS) ? ANSWER_NEEDS_TLS :
		    BSMTP_ANSWER_NOT_ALLOWED, 0);
		end_with(s, BSMTP_END_REFUSED);
		return;
	}
	if (s->config->no_smtp && call->verb != BSMTP_VERB_BSMTP) {
		owe(s, ANSWER_NO_SMTP, 0);
		return;
	}
	s->aborting = s->mail_ok;
	reset_transaction(s);
	s->hello = (unsigned char)call->verb;
	call->event->type = BSMTP_SERVER_HELLO;
	call->event->text = slice(name.at, n);
	accept_call(s, call, call->verb == BSMTP_VERB_HELO ? ANSWER_HELO : ANSWER_EHLO);
}

static void act_bsmtp(struct bsmtp_server *s, struct call *call)
{
	switch (s->config->opening) {
	case BSMTP_OPENING_SILENT:
		call->custom = ANSWER_SILENT;
		break;
	case BSMTP_OPENING_REFUSE:
		owe(s, BSMTP_ANSWER_NOT_ALLOWED, 0);
		end_with(s, BSMTP_END_REFUSED);
		return;
	case BSMTP_OPENING_CLOSE:
		owe(s, ANSWER_DROP, 0);
		end_with(s, BSMTP_END_REFUSED);
		return;
	case BSMTP_OPENING_UNKNOWN:
		owe(s, ANSWER_UNKNOWN, 0);
		return;
	case BSMTP_OPENING_ACCEPT:
	case BSMTP_OPENINGS:
		break;
	}
	s->streams = true;
	act_hello(s, call);
}

static bool parse_size_value(uint64_t *size, struct bsmtp_slice value)
{
	return value.len > 0 &&
	    bsmtp_number_parse(size, value.at, value.len) == (ptrdiff_t)value.len;
}

/* One parameter of MAIL, which belongs to the keyword *key: 0, or the answer that
 * refuses it. */
static unsigned mail_parameter(struct bsmtp_server *s, const struct bsmtp_parameter *p,
    struct bsmtp_server_event *event, unsigned *key)
{
	uint64_t size = 0;

	*key = 0;
	if (same(p->keyword, "SIZE")) {
		*key = BSMTP_KEY_SIZE;
		if (!parse_size_value(&size, p->value))
			return ANSWER_BAD_PARAMETER;
		s->oversize = size > s->config->max_size;
	} else if (same(p->keyword, "BODY")) {
		*key = BSMTP_KEY_8BITMIME;
		event->eightbit = same(p->value, "8BITMIME");
		if (!event->eightbit && !same(p->value, "7BIT"))
			return ANSWER_BAD_PARAMETER;
	} else if (same(p->keyword, "SMTPUTF8")) {
		*key = p->value.at == NULL ? BSMTP_KEY_SMTPUTF8 : 0;
		event->utf8 = true;
	} else if (same(p->keyword, "TRANSID")) {
		*key = BSMTP_KEY_BSMTP;
		event->transid = p->value;
		if (!bsmtp_transid_valid(p->value))
			return ANSWER_BAD_PARAMETER;
	}
	return 0;
}

/* The parameters of MAIL: 0, or the answer that refuses them.  Each stands once. */
static unsigned mail_parameters(struct bsmtp_server *s, struct bsmtp_slice rest,
    struct bsmtp_server_event *event)
{
	unsigned keys = s->hello == BSMTP_VERB_HELO ? 0 : s->config->keywords, seen = 0;

	while (rest.len > 0) {
		struct bsmtp_parameter p;
		ptrdiff_t used = bsmtp_parameter_parse(&p, rest.at, rest.len);
		unsigned refusal, key;
		if (used <= 0)
			return ANSWER_BAD_PARAMETER;
		rest = slice(rest.at + used, rest.len - (size_t)used);
		refusal = mail_parameter(s, &p, event, &key);
		if (!(keys & key))
			return ANSWER_NO_PARAMETER;
		if (refusal != 0 || (seen & key))
			return ANSWER_BAD_PARAMETER;
		seen |= key;
	}
	return 0;
}

/* MAIL in an open transaction: that one has failed, with what follows of it, until its
 * body ends or RSET comes (RFC 5321 4.1.4 has no nesting). */
static void nest_mail(struct bsmtp_server *s, struct call *call)
{
	owe(s, ANSWER_NESTED, 0);
	condemn(s, ANSWER_NESTED, 0);
	if (s->mail_ok)
		call->event->type = BSMTP_SERVER_ABORT;
	s->mail_ok = false;
}

/* Who may say MAIL now: 0, or the answer that refuses it. */
static unsigned refuse_sender(const struct bsmtp_server *s)
{
	if (s->hello == 0 && s->config->opening != BSMTP_OPENING_UNKNOWN)
		return ANSWER_NO_HELLO;
	if (s->config->require_tls && !(s->flags & BSMTP_PEER_TLS))
		return ANSWER_NEEDS_TLS;
	if (s->config->auth)
		return s->authed ? 0 : ANSWER_NEEDS_AUTH;
	return s->flags & BSMTP_PEER_ALLOWED ? 0 : BSMTP_ANSWER_NOT_ALLOWED;
}

/* Path and parameters of MAIL: 0, or the answer that refuses them.  The size of a
 * message with an id is judged with its recipients: some may have it already. */
static unsigned refuse_mail(struct bsmtp_server *s, struct bsmtp_slice rest, struct bsmtp_slice *path,
    struct bsmtp_server_event *event)
{
	ptrdiff_t used = path_argument(&rest, "FROM:") ? bsmtp_path_parse(path, rest.at, rest.len,
	    BSMTP_PATH_NULL | BSMTP_PATH_UTF8) : BSMTP_BAD;
	unsigned refusal;

	s->oversize = false;            /* what a MAIL before it said, that was refused */
	if (used <= 0)
		return ANSWER_BAD_PATH;
	refusal = mail_parameters(s, slice(rest.at + used, rest.len - (size_t)used), event);
	if (refusal != 0)
		return refusal;
	if (bsmtp_has_8bit(*path) && !event->utf8)
		return ANSWER_NEEDS_UTF8;
	if (event->transid.len > 0)
		return 0;
	if (s->oversize)
		return ANSWER_TOO_BIG;
	return s->flags & BSMTP_PEER_EARLY ? ANSWER_EARLY : 0;
}

static void act_mail(struct bsmtp_server *s, struct call *call)
{
	struct bsmtp_slice path = slice("", 0);
	unsigned refusal;

	if (s->config->stopping) {
		owe(s, BSMTP_ANSWER_STOPPING, 0);
		end_with(s, BSMTP_END_QUIT);
		return;
	}
	if (s->mail_ok || s->chunks || s->verdict != 0) {
		nest_mail(s, call);
		return;
	}
	s->mail_tried = true;
	refusal = refuse_sender(s);
	if (refusal == 0)
		refusal = refuse_mail(s, call->argument, &path, call->event);
	if (refusal != 0) {
		owe(s, refusal, 0);
		return;
	}
	s->mail_ok = true;
	s->utf8 = call->event->utf8;
	call->event->type = BSMTP_SERVER_MAIL;
	call->event->text = path;
	accept_call(s, call, ANSWER_MAIL);
}

/* What the caller says of a recipient: STORED takes it, DUPLICATE knows that it has this
 * message, the others refuse it. */
static enum bsmtp_answer judge_rcpt(const struct bsmtp_server *s, struct bsmtp_slice path)
{
	return s->config->judge != NULL ? s->config->judge(s->judge_context, path) :
	    BSMTP_ANSWER_STORED;
}

/* RCPT by its form and place: 0, or the answer that refuses it. */
static unsigned refuse_rcpt(const struct bsmtp_server *s, struct bsmtp_slice rest,
    struct bsmtp_slice *path)
{
	ptrdiff_t used = path_argument(&rest, "TO:") ? bsmtp_path_parse(path, rest.at, rest.len,
	    BSMTP_PATH_POSTMASTER | BSMTP_PATH_UTF8) : BSMTP_BAD;

	if (s->chunks)
		return ANSWER_NESTED;
	if (!s->mail_ok)
		return ANSWER_NO_MAIL;
	if (used <= 0)
		return ANSWER_BAD_RCPT;
	if ((size_t)used < rest.len)
		return ANSWER_NO_PARAMETER;
	return bsmtp_has_8bit(*path) && !s->utf8 ? ANSWER_NEEDS_UTF8 : 0;
}

/* A new recipient: whether there is room for it, and for the message. */
static unsigned refuse_new_rcpt(const struct bsmtp_server *s, enum bsmtp_answer judged)
{
	if (judged != BSMTP_ANSWER_STORED)
		return judged;
	if (s->oversize)
		return ANSWER_TOO_BIG;
	return s->rcpts_new >= s->config->max_recipients ? BSMTP_ANSWER_TOO_MANY : 0;
}

static void act_rcpt(struct bsmtp_server *s, struct call *call)
{
	struct bsmtp_slice path = slice("", 0);
	unsigned refusal = refuse_rcpt(s, call->argument, &path);
	bool known = false;

	if (refusal == 0) {
		enum bsmtp_answer judged = judge_rcpt(s, path);
		known = judged == BSMTP_ANSWER_DUPLICATE;
		refusal = known ? 0 : refuse_new_rcpt(s, judged);
	}
	if (refusal != 0) {
		owe(s, refusal, 0);
		return;
	}
	s->rcpts++;
	s->rcpts_new += !known;
	call->event->type = BSMTP_SERVER_RCPT;
	call->event->text = path;
	call->event->known = known;
	accept_call(s, call, ANSWER_RCPT);
}

/* DATA is answered 354 whatever was refused before, and its body read to the
 * end: RFC 2920 3.1 has clients ready for it, and only so can a body sent blind
 * never be run as commands.  Only where no MAIL was even tried, in a session that
 * nobody opened with BSMTP, can no body be on its way. */
static void act_data(struct bsmtp_server *s, struct call *call)
{
	bool refused = call->custom == ANSWER_CUSTOM &&
	    s->config->faults[call->custom_argument].reply.at[0] != '3';

	if (trim(call->argument).len > 0) {     /* no DATA, and a body may follow it */
		owe(s, ANSWER_BAD_PARAMETER, 0);
		if (s->streams) {
			abort_transaction(s, call->event);
			end_with(s, BSMTP_END_ERROR);
		}
		return;
	}
	if (s->chunks && !s->streams) {
		owe(s, ANSWER_NESTED, 0);
		return;
	}
	if (!s->mail_tried && !s->streams) {
		owe(s, ANSWER_NO_MAIL, 0);
		return;
	}
	if (refused && !s->streams) {
		accept_call(s, call, ANSWER_DATA);
		return;
	}
	if (refused) {
		condemn(s, call->custom, call->custom_argument);
		call->custom = 0;
	}
	accept_call(s, call, ANSWER_DATA);
	if (s->chunks)
		condemn(s, ANSWER_NESTED, 0);
	begin_body(s);
	s->state = SERVER_DATA;
}

static void act_bdat(struct bsmtp_server *s, struct call *call)
{
	struct bsmtp_slice rest = trim(call->argument);
	ptrdiff_t used = bsmtp_number_parse(&s->chunk, rest.at, rest.len);

	if (used > 0)
		rest = trim(slice(rest.at + used, rest.len - (size_t)used));
	s->last = same(rest, "LAST");
	if (used <= 0 || (rest.len > 0 && !s->last) || s->chunk > INT64_MAX) {
		owe(s, ANSWER_BAD_BDAT, 0);
		end_with(s, BSMTP_END_ERROR);
		return;
	}
	begin_body(s);
	if (!(s->config->keywords & BSMTP_KEY_CHUNKING))
		condemn(s, ANSWER_NOT_HERE, 0);
	if (call->custom == ANSWER_SILENT || (call->custom == ANSWER_CUSTOM &&
	    s->config->faults[call->custom_argument].reply.at[0] > '3'))
		condemn(s, call->custom, call->custom_argument);
	s->chunks = true;
	s->state = SERVER_CHUNK;
}

static void act_rset(struct bsmtp_server *s, struct call *call)
{
	abort_transaction(s, call->event);
	accept_call(s, call, ANSWER_RSET);
}

static void act_quit(struct bsmtp_server *s, struct call *call)
{
	abort_transaction(s, call->event);
	accept_call(s, call, ANSWER_QUIT);
	end_with(s, BSMTP_END_QUIT);
}

/* The name and the password are there: the caller judges, and the session waits.
 * They lie in `line`, which nothing else uses meanwhile. */
static void ask_verdict(struct bsmtp_server *s, struct bsmtp_slice name, struct bsmtp_slice secret,
    struct bsmtp_server_event *event)
{
	event->type = BSMTP_SERVER_AUTH;
	event->text = name;
	event->secret = secret;
	event->ticket = s->auth_ticket = owe(s, ANSWER_AUTH, 0);
	held_at(s, event->ticket)->open = true;
	s->state = SERVER_VERDICT;
}

/* authzid NUL authcid NUL passwd (RFC 4616); an authzid that is another's is not
 * to be had. */
static void take_plain(struct bsmtp_server *s, struct bsmtp_slice response,
    struct bsmtp_server_event *event)
{
	struct text t = { s->line, 0, sizeof s->line };
	const char *name, *secret = NULL;
	size_t left;

	if (!take_base64(&t, response) || t.len == 0 || (name = memchr(t.at, '\0', t.len)) == NULL) {
		owe(s, ANSWER_BAD_AUTH, 0);
		return;
	}
	left = t.len - (size_t)(++name - t.at);
	secret = left > 0 ? memchr(name, '\0', left) : NULL;
	if (secret == NULL || secret == name) {
		owe(s, ANSWER_BAD_AUTH, 0);
		return;
	}
	ask_verdict(s, slice(name, (size_t)(secret - name)),
	    slice(secret + 1, t.len - (size_t)(secret + 1 - t.at)), event);
}

enum { AUTH_PLAIN = 1, AUTH_NAME, AUTH_PASSWORD };

/* A response, with its command or behind 334. */
static void take_response(struct bsmtp_server *s, struct bsmtp_slice response,
    struct bsmtp_server_event *event)
{
	struct text name = { s->name, 0, sizeof s->name }, secret = { s->line, 0, sizeof s->line };
	unsigned step = s->auth_step;

	s->auth_step = 0;
	s->state = SERVER_COMMAND;
	if (same(response, "=") && step == AUTH_PLAIN)
		response.len = 0;
	if (step == AUTH_PLAIN) {
		take_plain(s, response, event);
	} else if (step == AUTH_NAME && take_base64(&name, response) && name.len > 0) {
		s->name_len = name.len;
		s->auth_step = AUTH_PASSWORD;
		s->state = SERVER_QUESTION;
		owe(s, ANSWER_ASK_PASSWORD, 0);
	} else if (step == AUTH_PASSWORD && take_base64(&secret, response)) {
		ask_verdict(s, slice(s->name, s->name_len), slice(s->line, secret.len), event);
	} else {
		owe(s, ANSWER_BAD_AUTH, 0);
	}
}

static void act_auth(struct bsmtp_server *s, struct call *call)
{
	struct bsmtp_slice word = trim(call->argument), rest;
	size_t n = 0;

	while (n < word.len && word.at[n] != ' ')
		n++;
	rest = trim(slice(word.at + n, word.len - n));
	word.len = n;
	if (s->hello == 0 || s->authed || s->mail_ok || !(offered(s) & BSMTP_KEY_AUTH)) {
		owe(s, !s->config->auth ? ANSWER_NOT_HERE : s->hello == 0 ? ANSWER_NO_HELLO :
		    s->authed || s->mail_ok ? ANSWER_AUTHED : ANSWER_NEEDS_TLS, 0);
		return;
	}
	if (s->flags & BSMTP_PEER_EARLY) {
		owe(s, ANSWER_EARLY_AUTH, 0);
		return;
	}
	s->auth_step = same(word, "PLAIN") ? AUTH_PLAIN : same(word, "LOGIN") ? AUTH_NAME : 0;
	if (s->auth_step == 0) {
		owe(s, ANSWER_NO_MECHANISM, 0);
	} else if (rest.len > 0) {
		take_response(s, rest, call->event);
	} else {
		owe(s, s->auth_step == AUTH_PLAIN ? ANSWER_ASK : ANSWER_ASK_NAME, 0);
		s->state = SERVER_QUESTION;
	}
}

static void act_simple(struct bsmtp_server *s, struct call *call)
{
	accept_call(s, call, call->verb == BSMTP_VERB_NOOP ? ANSWER_NOOP :
	    call->verb == BSMTP_VERB_VRFY ? ANSWER_VRFY :
	    call->verb == BSMTP_VERB_HELP ? ANSWER_HELP :
	    call->verb == BSMTP_VERB_EXPN ? ANSWER_NOT_HERE : ANSWER_UNKNOWN);
}

static void act_foreign(struct bsmtp_server *s, struct call *call)
{
	abort_transaction(s, call->event);
	owe(s, ANSWER_FOREIGN, 0);
	end_with(s, BSMTP_END_ERROR);
}

/* One row a verb. */
static const struct verb {
	const char *name;
	void (*act)(struct bsmtp_server *s, struct call *call);
} verbs[BSMTP_VERBS] = {
	[BSMTP_VERB_CONNECT] = { "CONNECT", act_foreign },      /* a proxy's, as a command */
	[BSMTP_VERB_HELO] = { "HELO", act_hello },
	[BSMTP_VERB_EHLO] = { "EHLO", act_hello },
	[BSMTP_VERB_BSMTP] = { "BSMTP", act_bsmtp },
	[BSMTP_VERB_MAIL] = { "MAIL", act_mail },
	[BSMTP_VERB_RCPT] = { "RCPT", act_rcpt },
	[BSMTP_VERB_DATA] = { "DATA", act_data },
	[BSMTP_VERB_BDAT] = { "BDAT", act_bdat },
	[BSMTP_VERB_BODY] = { "BODY", act_simple },
	[BSMTP_VERB_RSET] = { "RSET", act_rset },
	[BSMTP_VERB_NOOP] = { "NOOP", act_simple },
	[BSMTP_VERB_VRFY] = { "VRFY", act_simple },
	[BSMTP_VERB_EXPN] = { "EXPN", act_simple },
	[BSMTP_VERB_HELP] = { "HELP", act_simple },
	[BSMTP_VERB_STARTTLS] = { "STARTTLS", act_starttls },
	[BSMTP_VERB_AUTH] = { "AUTH", act_auth },
	[BSMTP_VERB_QUIT] = { "QUIT", act_quit },
	[BSMTP_VERB_FOREIGN] = { "HTTP", act_foreign },
	[BSMTP_VERB_UNKNOWN] = { "unknown", act_simple },
};

/* Pages in a browser can be made to post to any port; such a body must not be
 * searched for commands. */
static const char *const foreign[] = { "GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE",
	"TRACE", "PATCH", "PRI" };

static enum bsmtp_verb verb_of(struct bsmtp_slice word)
{
	for (int v = 0; v < BSMTP_VERB_FOREIGN; v++)
		if (v != BSMTP_VERB_BODY && same(word, verbs[v].name))
			return (enum bsmtp_verb)v;
	for (size_t i = 0; i < COUNT(foreign); i++)
		if (same(word, foreign[i]))
			return BSMTP_VERB_FOREIGN;
	return BSMTP_VERB_UNKNOWN;
}

/* What a fault's GLOB is matched with. */
static struct bsmtp_slice fault_argument(const struct call *call)
{
	struct bsmtp_slice rest = call->argument, path = rest;

	if (call->verb != BSMTP_VERB_MAIL && call->verb != BSMTP_VERB_RCPT)
		return trim(rest);
	if (path_argument(&rest, call->verb == BSMTP_VERB_MAIL ? "FROM:" : "TO:"))
		(void)bsmtp_path_parse(&path, rest.at, rest.len,
		    BSMTP_PATH_NULL | BSMTP_PATH_POSTMASTER | BSMTP_PATH_UTF8);
	return path;
}

/* Whether a fault leaves the command to its row: those that refuse do not, but
 * for DATA and BDAT, whose body may follow in any case. */
static bool fault_permits(struct bsmtp_server *s, struct call *call, const struct bsmtp_fault *f)
{
	bool ends;

	call->custom = fault_answer(s, f, &call->custom_argument);
	if (f->action == BSMTP_FAULT_DROP) {
		abort_transaction(s, call->event);
		owe(s, ANSWER_DROP, 0);
		end_with(s, BSMTP_END_ERROR);
		return false;
	}
	ends = f->action == BSMTP_FAULT_REPLY && memcmp(f->reply.at, "421", 3) == 0;
	if (!ends && (!is_refusal(f) || call->verb == BSMTP_VERB_BDAT || call->verb == BSMTP_VERB_DATA))
		return true;
	if (call->verb == BSMTP_VERB_RCPT && s->mail_ok &&
	    judge_rcpt(s, fault_argument(call)) == BSMTP_ANSWER_DUPLICATE) {
		call->custom = 0;               /* what is known is not judged anew */
		return true;
	}
	s->mail_tried = s->mail_tried || call->verb == BSMTP_VERB_MAIL;
	owe(s, call->custom, call->custom_argument);
	if (ends) {
		abort_transaction(s, call->event);
		end_with(s, BSMTP_END_ERROR);
	}
	return false;
}

/* Carries out the command in line, which has no CRLF any more. */
static void command(struct bsmtp_server *s, struct bsmtp_slice line,
    struct bsmtp_server_event *event)
{
	struct call call = { .event = event };
	struct bsmtp_fault *f;
	size_t n = 0;

	memset(event, 0, sizeof *event);
	while (n < line.len && line.at[n] != ' ')
		n++;
	call.verb = verb_of(slice(line.at, n));
	call.argument = n < line.len ? slice(line.at + n + 1, line.len - n - 1) : slice(line.at + n, 0);
	f = s->resumed ? NULL : find_fault(s, call.verb, fault_argument(&call));
	s->resumed = false;
	if (f != NULL && f->action == BSMTP_FAULT_DELAY) {
		event->type = BSMTP_SERVER_DELAY;
		event->number = f->delay_ms;
		memmove(s->line, line.at, line.len);
		s->line_len = line.len;
		s->resumed = true;
	} else if (f == NULL || fault_permits(s, &call, f)) {
		verbs[call.verb].act(s, &call);
	}
}

/* A line that cannot be read.  If it was to announce a body, what follows must not
 * be taken for commands: nothing more is read. */
static void bad_line(struct bsmtp_server *s, struct bsmtp_slice line, unsigned answer,
    struct bsmtp_server_event *event)
{
	struct bsmtp_slice word = slice(line.at, min_size(line.len, 4));

	owe(s, answer, 0);
	if (!same(word, "DATA") && !same(word, "BDAT"))
		return;
	abort_transaction(s, event);
	end_with(s, BSMTP_END_ERROR);
}

/* Secrets are masked where transcripts are made: all that stands behind AUTH and a
 * mechanism that is known. */
static void tap_command(struct bsmtp_server *s, struct bsmtp_slice line)
{
	size_t n = min_size(line.len, 5);
	struct bsmtp_slice rest = trim(slice(line.at + n, line.len - n)), word = rest;

	word.len = min_size(word.len, 5);
	if (s->state == SERVER_QUESTION)
		line = slice_of("****");
	else if (same(slice(line.at, n), "AUTH ") && same(word, "PLAIN"))
		line = slice_of(rest.len > 5 ? "AUTH PLAIN ****" : "AUTH PLAIN");
	else if (same(slice(line.at, n), "AUTH ") && same(word, "LOGIN"))
		line = slice_of(rest.len > 5 ? "AUTH LOGIN ****" : "AUTH LOGIN");
	else if (same(slice(line.at, n), "AUTH "))
		line = slice_of("AUTH ****");
	tap_line(s->config->tap, s->tap_context, BSMTP_TAP_COMMAND, line, 0);
}

/* A line is whole, its LF included. */
static void command_line(struct bsmtp_server *s, struct bsmtp_slice line,
    struct bsmtp_server_event *event)
{
	bool crlf = line.len >= 2 && line.at[line.len - 2] == '\r';

	line.len -= crlf ? 2 : 1;
	tap_command(s, line);
	if (!crlf) {
		bad_line(s, line, ANSWER_NEWLINE, event);
		return;
	}
	for (size_t i = 0; i < line.len; i++)
		if ((line.at[i] >= 0 && line.at[i] < ' ') || line.at[i] == 127) {
			bad_line(s, line, ANSWER_OCTET, event);
			return;
		}
	while (line.len > 0 && line.at[line.len - 1] == ' ')
		line.len--;
	if (s->state == SERVER_QUESTION)
		take_response(s, line, event);
	else
		command(s, line, event);
}

static size_t in_command(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	size_t window = min_size(len, BSMTP_COMMAND_MAX), n;
	const char *lf;

	if (s->resumed) {
		n = s->line_len;
		s->line_len = 0;
		command(s, slice(s->line, n), event);
		return 0;
	}
	lf = s->line_len == 0 && window > 0 ? memchr(in, '\n', window) : NULL;
	if (lf != NULL) {
		n = (size_t)(lf - in) + 1;
		command_line(s, slice(in, n), event);
		return n;
	}
	n = gather(s->line, &s->line_len, sizeof s->line, in, len);
	if (s->line_len > 0 && s->line[s->line_len - 1] == '\n') {
		window = s->line_len;
		s->line_len = 0;
		command_line(s, slice(s->line, window), event);
	} else if (s->line_len == sizeof s->line) {
		s->line_len = 0;
		s->state = SERVER_LONG;
	}
	return n;
}

static size_t in_long(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	const char *lf = len > 0 ? memchr(in, '\n', len) : NULL;

	if (lf == NULL)
		return len;
	s->state = SERVER_COMMAND;
	bad_line(s, slice(s->line, sizeof s->line), ANSWER_LONG, event);
	return (size_t)(lf - in) + 1;
}

/* The first step of all: the greeting, or the door shut. */
static void greet(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	struct bsmtp_fault *f = NULL;
	uint64_t argument = 0;
	unsigned answer = ANSWER_GREETING;
	bool stranger = !(s->flags & (BSMTP_PEER_ALLOWED | BSMTP_PEER_GUEST));

	if (!s->resumed)
		f = find_fault(s, BSMTP_VERB_CONNECT, slice("", 0));
	s->resumed = false;
	if (f != NULL && f->action == BSMTP_FAULT_DELAY) {
		event->type = BSMTP_SERVER_DELAY;
		event->number = f->delay_ms;
		s->resumed = true;
		return;
	}
	s->state = SERVER_COMMAND;
	if (f != NULL)
		answer = fault_answer(s, f, &argument);
	if (stranger)
		answer = BSMTP_ANSWER_NOT_ALLOWED;
	owe(s, answer, argument);
	if (stranger || answer == ANSWER_DROP ||
	    (answer == ANSWER_CUSTOM && f->reply.at[0] > '3'))
		end_with(s, BSMTP_END_REFUSED);
}

void bsmtp_server_init(struct bsmtp_server *s, struct bsmtp_server_config *config, unsigned flags,
    struct bsmtp_held *held, size_t held_size)
{
	memset(s, 0, sizeof *s);
	s->config = config;
	s->flags = (unsigned char)flags;
	s->held = held;
	s->held_size = held_size;
	s->state = SERVER_CONNECT;
	reset_transaction(s);
}

void bsmtp_server_early(struct bsmtp_server *s, bool early)
{
	s->flags = (unsigned char)((s->flags & ~(unsigned)BSMTP_PEER_EARLY) |
	    (early ? BSMTP_PEER_EARLY : 0u));
}

void bsmtp_server_secured(struct bsmtp_server *s, unsigned flags)
{
	s->flags = (unsigned char)(flags | BSMTP_PEER_TLS);
	s->state = SERVER_COMMAND;
	s->hello = 0;
	s->streams = s->authed = false;
	s->line_len = 0;
	reset_transaction(s);
}

size_t bsmtp_server_in(struct bsmtp_server *s, const char *in, size_t len,
    struct bsmtp_server_event *event)
{
	size_t used = 0;

	in = len > 0 ? in : "";
	memset(event, 0, sizeof *event);
	if (s->aborting) {              /* a hello in mid-transaction was two events */
		s->aborting = false;
		event->type = BSMTP_SERVER_ABORT;
		return 0;
	}
	while (event->type == BSMTP_SERVER_MORE) {
		const char *at = in + used;
		size_t left = len - used;
		bool empty_step = s->resumed || s->decoder.ended;

		if (s->state == SERVER_ENDED) {
			event->type = BSMTP_SERVER_END;
			return len;
		}
		if (s->state == SERVER_TLS || s->state == SERVER_VERDICT) {
			event->type = s->state == SERVER_TLS ? BSMTP_SERVER_STARTTLS : BSMTP_SERVER_FULL;
			return used;
		}
		if (bsmtp_server_owed(s) + 2 > s->held_size) {
			event->type = BSMTP_SERVER_FULL;
			return used;
		}
		if (left == 0 && !empty_step && s->state != SERVER_CONNECT &&
		    !(s->state == SERVER_CHUNK && s->chunk == 0))
			return used;
		switch ((enum server_state)s->state) {
		case SERVER_CONNECT:
			greet(s, event);
			break;
		case SERVER_COMMAND:
		case SERVER_QUESTION:
			used += in_command(s, at, left, event);
			break;
		case SERVER_LONG:
			used += in_long(s, at, left, event);
			break;
		case SERVER_DATA:
			used += in_data(s, at, left, event);
			break;
		case SERVER_CHUNK:
			used += in_chunk(s, at, left, event);
			break;
		case SERVER_TLS:
		case SERVER_VERDICT:
		case SERVER_ENDED:
			break;
		}
	}
	return used;
}

static void end_session(struct bsmtp_server *s, enum bsmtp_end end,
    struct bsmtp_server_event *event)
{
	memset(event, 0, sizeof *event);
	event->type = BSMTP_SERVER_END;
	abort_transaction(s, event);
	end_with(s, end);
}

void bsmtp_server_eof(struct bsmtp_server *s, struct bsmtp_server_event *event)
{
	end_session(s, BSMTP_END_EOF, event);
}

void bsmtp_server_stop(struct bsmtp_server *s, enum bsmtp_answer reason,
    struct bsmtp_server_event *event)
{
	if (s->state != SERVER_ENDED && bsmtp_server_owed(s) < s->held_size)
		owe(s, reason, 0);
	end_session(s, reason == BSMTP_ANSWER_TIMEOUT ? BSMTP_END_TIMEOUT :
	    reason == BSMTP_ANSWER_STOPPING ? BSMTP_END_QUIT : BSMTP_END_REFUSED, event);
}

enum bsmtp_end bsmtp_server_end(const struct bsmtp_server *s)
{
	return (enum bsmtp_end)s->end;
}

enum bsmtp_verb bsmtp_server_hello(const struct bsmtp_server *s)
{
	return (enum bsmtp_verb)s->hello;
}

/* ==== 7 names ============================================================ */

/* The word at index i of a table; "?" where there is none. */
static const char *word_at(const char *const *table, size_t count, unsigned i)
{
	return i < count && table[i] != NULL ? table[i] : "?";
}

const char *bsmtp_mode_name(enum bsmtp_mode mode)
{
	return (unsigned)mode < BSMTP_MODES ? modes[mode].name : "?";
}

const char *bsmtp_framing_name(enum bsmtp_framing framing)
{
	static const char *const words[] = { "auto", "bdat", "data" };
	return word_at(words, COUNT(words), framing);
}

const char *bsmtp_fate_name(enum bsmtp_fate fate)
{
	static const char *const words[] = {
		[BSMTP_UNSENT] = "unsent", [BSMTP_UNKNOWN] = "unknown",
		[BSMTP_DELIVERED] = "delivered", [BSMTP_DEFERRED] = "deferred",
		[BSMTP_REJECTED] = "rejected",
	};
	return word_at(words, COUNT(words), fate);
}

const char *bsmtp_keyword_name(enum bsmtp_keyword keyword)
{
	static const char *const words[] = { "BSMTP", "PIPELINING", "8BITMIME", "SMTPUTF8",
		"CHUNKING", "ENHANCEDSTATUSCODES", "SIZE", "LIMITS", "STARTTLS", "AUTH", "DSN" };
	unsigned i = 0;

	while (i < COUNT(words) && (unsigned)keyword != 1u << i)
		i++;
	return word_at(words, COUNT(words), i);
}

const char *bsmtp_error_text(enum bsmtp_error error)
{
	static const char *const words[] = {
		[BSMTP_OK] = "no error",
		[BSMTP_E_REFUSED] = "the server refused the session",
		[BSMTP_E_DEFERRED] = "the server refused the session for now",
		[BSMTP_E_REPLY] = "the server sent something that is no SMTP reply",
		[BSMTP_E_REPLY_LONG] = "the server sent a reply without end",
		[BSMTP_E_UNASKED] = "the server sent a reply to nothing",
		[BSMTP_E_OUT_OF_PLACE] = "the server sent a reply that cannot answer the command",
		[BSMTP_E_MISCOUNTED] = "the replies do not match the commands: too many, or too few",
		[BSMTP_E_RUN] = "the server took a body for commands",
		[BSMTP_E_STOPPED] = "the server ended the session",
		[BSMTP_E_NO_TLS] = "TLS is wanted, and the server does not have it",
		[BSMTP_E_AUTH] = "the server does not accept the name and its password",
		[BSMTP_E_CLOSED] = "the server closed the connection with replies due",
	};
	return word_at(words, COUNT(words), error);
}

const char *bsmtp_verb_name(enum bsmtp_verb verb)
{
	return (unsigned)verb < BSMTP_VERBS ? verbs[verb].name : "?";
}

const char *bsmtp_opening_name(enum bsmtp_opening opening)
{
	static const char *const words[] = { "accept", "silent", "refuse", "close", "unknown" };
	return word_at(words, COUNT(words), opening);
}

const char *bsmtp_end_name(enum bsmtp_end end)
{
	static const char *const words[] = { "open", "quit", "eof", "timeout", "refused", "error" };
	return word_at(words, COUNT(words), end);
}

#ifndef BSMTP_NO_MAIN
/* ======== the wall: below it, the operating system ======================== */

/* What the command line and the environment asked for; set once. */
struct list {
	char **items;
	size_t count, room;
};

struct cidr {
	unsigned char address[16];      /* IPv4 as ::ffff:a.b.c.d */
	unsigned bits;
};

enum progress_when { PROGRESS_AUTO, PROGRESS_ALWAYS, PROGRESS_NEVER, PROGRESS_WHENS };
enum format { FORMAT_AUTO, FORMAT_MESSAGE, FORMAT_MBOX, FORMAT_MAILDIR, FORMAT_BATCH, FORMAT_RAW,
	FORMAT_SENDMAIL, FORMATS };
enum store_kind { STORE_MAILDIR, STORE_EML, STORE_MBOX, STORE_BATCH, STORE_EXEC, STORE_DISCARD };

static struct options {
	bool json, trace;
	bool timeout_given;
	uint64_t timeout_ms;
	struct list operands;
	/* TLS, and who may speak */
	bool tls, starttls, require_tls, insecure, transid, early_data, fastopen;
	uint64_t remember_ms;
	char *cert, *key, *ca, *client_ca, *pin, *tls_name, *tickets, *user, *password_file, *password, *users;
	/* send */
	char *server, *connect_command, *from, *helo, *output;
	char *parameters, *rcpt_parameters;     /* that go with MAIL and with RCPT */
	struct list to;
	bool to_headers, mboxo, await_greeting, blind;
	unsigned format, mode, fallback, framing, progress;
	char *peers;
	int family;
	bool grace_given;
	uint64_t grace_ms, stop_after;
	/* listen */
	unsigned store;
	bool store_given;
	char *store_path;
	struct cidr *allow;
	size_t allow_count;
	bool no_smtp, normalize, once, stdio, deadline_given;
	char *hostname, *address_file, *transids;
	uint64_t max_size, max_recipients, max_connections, max_per_peer;
	uint64_t count, deadline_ms, latency_ms, cut_octets, cut_messages;
	unsigned opening, keywords;
	struct bsmtp_fault *faults;     /* they borrow from the rules' text */
	size_t fault_count;
	struct list rules;
	char *called;           /* our own name, where it is sendmail's */
} options;

static void diag(const char *format, ...) PRINTF_LIKE(1, 2);
static const char *parse_number(const char *text, void *where);

static void die_of_memory(void)
{
	diag("out of memory");
	exit(EX_OSERR);
}

static const char *or_empty(const char *s)
{
	return s != NULL ? s : "";
}

static void *grow(void *memory, size_t size)
{
	void *p = realloc(memory, size);

	if (p == NULL)
		die_of_memory();
	return p;
}

static char *copy_slice(struct bsmtp_slice s)
{
	char *copy = grow(NULL, s.len + 1);

	if (s.len > 0)
		memcpy(copy, s.at, s.len);
	copy[s.len] = '\0';
	return copy;
}

/* Text of any length, printed into memory. */
struct printout {
	char *at;
	size_t len, room;
};

enum { PRINTOUT_STEP = 256 };   /* what most lines have room in */

static void printout_add(struct printout *t, const char *format, ...) PRINTF_LIKE(2, 3);

static void printout_add(struct printout *t, const char *format, ...)
{
	va_list list;
	int n;

	for (size_t need = PRINTOUT_STEP;; need = (size_t)n + 1) {
		if (t->room - t->len < need) {
			t->room = 2 * t->room + need;
			t->at = grow(t->at, t->room);
		}
		va_start(list, format);
		n = vsnprintf(t->at + t->len, t->room - t->len, format, list);
		va_end(list);
		if (n < 0 || (size_t)n < t->room - t->len)
			break;
	}
	t->len += n > 0 ? (size_t)n : 0;
}

enum { JSON_ESCAPE = 8 };

/* Takes the next octets from s, as a JSON string has them (RFC 8259 7); what needs an escape
 * is made in `room`.  Octets that are no UTF-8 become U+FFFD. */
static struct bsmtp_slice json_next(struct bsmtp_slice *s, char room[JSON_ESCAPE])
{
	size_t n = utf8_sequence(*s);
	unsigned char c = (unsigned char)s->at[0];
	struct bsmtp_slice next = slice(s->at, n);

	if (n == 0)
		next = slice("\xEF\xBF\xBD", 3);
	else if (c == '"' || c == '\\')
		next = slice(room, (size_t)snprintf(room, JSON_ESCAPE, "\\%c", c));
	else if (c < ' ' || c == 127)
		next = slice(room, (size_t)snprintf(room, JSON_ESCAPE, "\\u%04x", c));
	*s = slice(s->at + (n > 0 ? n : 1), s->len - (n > 0 ? n : 1));
	return next;
}

static void list_add(struct list *list, struct bsmtp_slice item)
{
	if (list->count == list->room) {
		list->room = list->room * 2 + 4;
		list->items = grow(list->items, list->room * sizeof *list->items);
	}
	list->items[list->count++] = copy_slice(item);
}

static bool list_has(const struct list *list, struct bsmtp_slice item)
{
	for (size_t i = 0; i < list->count; i++)
		if (strlen(list->items[i]) == item.len && memcmp(list->items[i], item.at, item.len) == 0)
			return true;
	return false;
}

static void list_free(struct list *list)
{
	for (size_t i = 0; i < list->count; i++)
		free(list->items[i]);
	free(list->items);
	memset(list, 0, sizeof *list);
}

static void print_hex(char *out, const unsigned char *octets, size_t len)
{
	static const char digits[] = "0123456789abcdef";

	for (size_t i = 0; i < len; i++) {
		*out++ = digits[octets[i] >> 4];
		*out++ = digits[octets[i] & 15];
	}
	*out = '\0';
}

/* A file that is written anew is there whole or not at all: what goes to the stream
 * gets the name when it is kept.  What is no file, as a pipe or a device, is written to.
 * NULL with errno. */
struct fresh {
	FILE *f;
	char path[PATH_MAX], tmp[PATH_MAX + 32];
};

static FILE *fresh_open(struct fresh *n, const char *path, mode_t mode)
{
	struct stat s;
	int fd;

	if (realpath(path, n->path) == NULL)    /* what a link names is written, not the link */
		snprintf(n->path, sizeof n->path, "%s", path);
	n->tmp[0] = '\0';
	if (stat(n->path, &s) == 0 && !S_ISREG(s.st_mode)) {
		fd = open(n->path, O_WRONLY | O_CLOEXEC);
	} else {
		snprintf(n->tmp, sizeof n->tmp, "%s.%ld", n->path, (long)getpid());
		(void)unlink(n->tmp);   /* of a process that had our number, and is dead */
		fd = open(n->tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	}
	n->f = fd >= 0 ? fdopen(fd, "w") : NULL;
	if (n->f == NULL && fd >= 0)
		close(fd);
	return n->f;
}

/* False with errno, and no trace is left. */
static bool fresh_keep(struct fresh *n, bool good)
{
	bool written = !ferror(n->f);
	int saved;

	good = fclose(n->f) == 0 && written && good && (n->tmp[0] == '\0' || rename(n->tmp, n->path) == 0);
	saved = errno;
	if (!good && n->tmp[0] != '\0')
		(void)unlink(n->tmp);
	errno = saved;
	return good;
}

/* A file of ours to read: a pipe or a device in its place is none.  NULL with errno. */
static FILE *open_own(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	struct stat s;
	FILE *f = NULL;

	if (fd >= 0 && fstat(fd, &s) == 0 && !S_ISREG(s.st_mode))
		errno = EINVAL;
	else if (fd >= 0)
		f = fdopen(fd, "r");
	if (f == NULL && fd >= 0)
		close(fd);
	return f;
}

/* Octets that nobody can guess; false with errno. */
static bool random_octets(void *out, size_t size)
{
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	bool good = fd >= 0 && read(fd, out, size) == (ssize_t)size;

	if (fd >= 0)
		close(fd);
	return good;
}

static int64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

enum { LOCK_MS = 10000, LOCK_STEP_MS = 10 };

static void pause_ms(long ms)
{
	struct timespec pause = { ms / 1000, ms % 1000 * 1000000 };

	nanosleep(&pause, NULL);
}

static int lock_file(int fd, short type)
{
	struct flock lock;

	memset(&lock, 0, sizeof lock);
	lock.l_type = type;
	lock.l_whence = SEEK_SET;
	return fcntl(fd, F_SETLK, &lock);
}

/* Takes a lock of the whole file, waiting at most LOCK_MS. */
static int await_lock(int fd, short type)
{
	int tries = LOCK_MS / LOCK_STEP_MS;

	while (lock_file(fd, type) != 0) {
		if ((errno != EACCES && errno != EAGAIN && errno != EINTR) || tries-- == 0)
			return -1;
		pause_ms(LOCK_STEP_MS);
	}
	return 0;
}

static const char *user_name(void)
{
	const char *name = getenv("LOGNAME");

	if (name == NULL || *name == '\0')
		name = getenv("USER");
	return name != NULL && *name != '\0' ? name : "root";
}

static const char *host_name(void)
{
	static char host[256];

	if (gethostname(host, sizeof host - 1) != 0 || !bsmtp_domain_valid(slice_of(host), false))
		snprintf(host, sizeof host, "localhost");
	return host;
}

/* ==== 8 link ============================================================= */

struct address {
	char host[256], port[32];
	bool local;             /* host is the path of a UNIX socket */
};

/* host, host:port, [v6]:port, :port, unix:/path; false if it is none. */
static bool parse_address(struct address *a, const char *text)
{
	const char *colon = strrchr(text, ':'), *port = "2525";
	size_t n = strlen(text);

	memset(a, 0, sizeof *a);
	if (strncmp(text, "unix:", 5) == 0) {
		a->local = true;
		text += 5;
		n -= 5;
		if (n == 0 || n >= sizeof ((struct sockaddr_un *)0)->sun_path)
			return false;
		memcpy(a->host, text, n);
		return true;
	}
	if (text[0] == '[') {
		const char *close = strchr(text, ']');
		if (close == NULL || (close[1] != '\0' && close[1] != ':'))
			return false;
		if (close[1] == ':')
			port = close + 2;
		n = (size_t)(close - text) - 1;
		text++;
	} else if (colon != NULL && strchr(text, ':') == colon) {
		port = colon + 1;
		n = (size_t)(colon - text);
	}
	if (n >= sizeof a->host || *port == '\0' || strlen(port) >= sizeof a->port)
		return false;
	memcpy(a->host, n > 0 ? text : "localhost", n > 0 ? n : sizeof "localhost");
	memcpy(a->port, port, strlen(port));
	return true;
}

static socklen_t local_address(struct sockaddr_un *un, const char *path)
{
	memset(un, 0, sizeof *un);
	un->sun_family = AF_UNIX;
	memcpy(un->sun_path, path, min_size(strlen(path), sizeof un->sun_path - 1));
	return (socklen_t)sizeof *un;
}

/* "127.0.0.1:2525", "[::1]:2525", or "unix" with the path that is known. */
static void name_address(char *out, size_t size, const struct sockaddr *sa, socklen_t len)
{
	char host[64], port[16];

	if (sa->sa_family == AF_UNIX) {
		const struct sockaddr_un *un = (const struct sockaddr_un *)(const void *)sa;
		bool named = len > offsetof(struct sockaddr_un, sun_path) && un->sun_path[0] != '\0';
		snprintf(out, size, "unix:%s", named ? un->sun_path : "");
	} else if (getnameinfo(sa, len, host, sizeof host, port, sizeof port,
	    NI_NUMERICHOST | NI_NUMERICSERV) == 0) {
		snprintf(out, size, sa->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
	} else {
		snprintf(out, size, "?");
	}
}

static bool set_flags(int fd)
{
	int one = 1;

	/* Replies and the ends of streams must not wait for an ACK; that it
	 * fails on a UNIX socket does not matter. */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	return fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 &&
	    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0;
}

/* The way to the peer: one socket, or two ends of pipes; TLS over it, or not. */
struct link {
	int in, out;            /* -1: closed */
	struct tls *tls;        /* NULL: in the clear */
};

enum { LINK_AGAIN = -1, LINK_FAILED = -2 };

/* Of read() and write(): octets moved; 0 at the end of input; LINK_AGAIN, LINK_FAILED
 * with errno. */
static ssize_t link_result(ssize_t n)
{
	if (n >= 0)
		return n;
	return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? LINK_AGAIN : LINK_FAILED;
}

/* ---- TLS: every call of OpenSSL is between here and the end of the section ---- */

#ifndef BSMTP_NO_TLS
struct tls {
	SSL *ssl;
	bool server, done;      /* the handshake is complete */
	bool gated;             /* our first flight is out; what comes is not TLS yet */
	bool may;               /* server: BSMTP may be agreed to by ALPN */
	unsigned flights, answered;     /* client: of its handshake's */
	const char *peer;       /* client: whose ticket it is */
	char subject[256];      /* of the certificate that was not accepted */
	short reads, writes;    /* what poll() is to wait for before the next try */
	bool dry;               /* nothing more is to be read before poll() says so */
	bool over;              /* the end came with the octets last read, and is still to be told */
	bool early;             /* octets go, or may come, before the handshake is complete */
	char *kept;             /* client: what went so, should it have to go again */
	size_t early_left, kept_len, kept_sent, flight_sent;
	char why[256];          /* it failed */
	bool cut;               /* for the connection ended, and nobody said why */
	const char *hint;       /* what would mend it, or NULL */
};

/* What all sessions of one side share. */
struct tls_context {
	SSL_CTX *ctx;
	unsigned char pin[32];
	bool pinned;
	char own_pin[65];       /* of the certificate made in memory, in hex */
};

/* The first error that OpenSSL queued, as words. */
static const char *tls_error(void)
{
	unsigned long code = ERR_get_error();
	const char *why = code != 0 ? ERR_reason_error_string(code) : NULL;

	ERR_clear_error();
	return why != NULL ? why : errno != 0 ? strerror(errno) : "no reason given";
}

/* The first error that OpenSSL queued is an alert about our certificate. */
static const char *alert_hint(void)
{
	switch (ERR_GET_REASON(ERR_peek_error())) {
	case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
		return " (it wants our certificate: give --cert)";
	case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
	case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
		return " (it does not accept our certificate: see --cert)";
	default:
		return "";
	}
}

static void tls_fail(struct tls *t, const char *why)
{
	if (t->why[0] == '\0')
		snprintf(t->why, sizeof t->why, "%s", why);
}

/* Whether OpenSSL failed for the end of the connection: a close or a reset. */
static bool is_cut(int error)
{
	return error == SSL_ERROR_SYSCALL || (error == SSL_ERROR_SSL &&
	    ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING);
}

/* What an attempt came to; `wants` is what to wait for before the next. */
static ssize_t tls_result(struct tls *t, int n, short *wants, short usual)
{
	int error = n > 0 ? SSL_ERROR_NONE : SSL_get_error(t->ssl, n);

	*wants = usual;
	if (n > 0)
		return n;
	switch (error) {
	case SSL_ERROR_WANT_READ:
		*wants = POLLIN;
		return LINK_AGAIN;
	case SSL_ERROR_WANT_WRITE:
		*wants = POLLOUT;
		return LINK_AGAIN;
	case SSL_ERROR_ZERO_RETURN:     /* close_notify: the peer's true end */
		return 0;
	case SSL_ERROR_SYSCALL:
	case SSL_ERROR_SSL:
	default:
		t->hint = alert_hint();
		t->cut = is_cut(error);
		tls_fail(t, tls_error());
		errno = EPROTO;
		return LINK_FAILED;
	}
}

static struct tls *tls_of(const SSL *ssl)
{
	return SSL_get_app_data(ssl);
}

/* Keeps whose certificate it was that is not accepted. */
static int on_certificate(int good, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	X509 *cert = X509_STORE_CTX_get_current_cert(store);
	struct tls *t = ssl != NULL ? tls_of(ssl) : NULL;

	if (!good && t != NULL && cert != NULL)
		(void)X509_NAME_oneline(X509_get_subject_name(cert), t->subject, sizeof t->subject);
	return good;
}

/* Names in the protocol's own form: ALPN's list has lengths before names. */
static const unsigned char alpn_bsmtp[] = { 5, 'b', 's', 'm', 't', 'p' };

/* A client that offers only names of other protocols is in the wrong place, or was
 * led there (ALPACA). */
static int select_alpn(SSL *ssl, const unsigned char **out, unsigned char *out_len,
    const unsigned char *in, unsigned in_len, void *context)
{
	(void)context;
	if (SSL_select_next_proto((unsigned char **)(uintptr_t)out, out_len, alpn_bsmtp,
	    sizeof alpn_bsmtp, in, in_len) != OPENSSL_NPN_NEGOTIATED)
		return SSL_TLSEXT_ERR_ALERT_FATAL;
	/* To select is to agree to BSMTP: that takes more than the name. */
	return tls_of(ssl)->may ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_NOACK;
}

static void log_keys(const SSL *ssl, const char *line)
{
	FILE *f = fopen(getenv("SSLKEYLOGFILE"), "a");

	(void)ssl;
	if (f == NULL)
		return;
	fprintf(f, "%s\n", line);
	(void)fclose(f);
}

static SSL_CTX *new_context(const SSL_METHOD *method)
{
	SSL_CTX *ctx = SSL_CTX_new(method);

	if (ctx == NULL)
		return NULL;
	(void)SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);
	(void)SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
	    SSL_OP_CIPHER_SERVER_PREFERENCE);
#ifdef SSL_OP_ENABLE_KTLS
	(void)SSL_CTX_set_options(ctx, SSL_OP_ENABLE_KTLS);
#endif
	(void)SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE |
	    SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
	SSL_CTX_set_read_ahead(ctx, 1);         /* as many records a read() as there are */
	SSL_CTX_set_default_read_buffer_len(ctx, min_size(IN_SIZE, IO_MAX));
	if (getenv("SSLKEYLOGFILE") != NULL)
		SSL_CTX_set_keylog_callback(ctx, log_keys);
	return ctx;
}

static void tls_context_free(struct tls_context *x)
{
	if (x == NULL)
		return;
	SSL_CTX_free(x->ctx);
	free(x);
}

/* The certificate and its key, from their files; false with a diagnostic. */
static bool load_certificate(SSL_CTX *ctx)
{
	const char *key = options.key != NULL ? options.key : options.cert;

	if (SSL_CTX_use_certificate_chain_file(ctx, options.cert) != 1)
		diag("%s: no certificate: %s", options.cert, tls_error());
	else if (SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1)
		diag("%s: no key: %s", key, tls_error());
	else if (SSL_CTX_check_private_key(ctx) != 1)
		diag("%s: the key is not that of the certificate", key);
	else
		return true;
	return false;
}

static bool certificate_digest(const X509 *cert, unsigned char digest[32])
{
	unsigned len = 0;

	return cert != NULL && X509_digest(cert, EVP_sha256(), digest, &len) == 1 && len == 32;
}

/* TLS for a trial: a certificate for this run, signed by itself, known by its pin. */
static bool make_certificate(struct tls_context *x)
{
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *cert = X509_new();
	X509_NAME *name = cert != NULL ? X509_get_subject_name(cert) : NULL;
	unsigned char digest[32];
	bool good = key != NULL && name != NULL && X509_set_version(cert, 2) == 1 &&
	    ASN1_INTEGER_set(X509_get_serialNumber(cert), (long)(now_us() & 0x7FFFFFFF)) == 1 &&
	    X509_gmtime_adj(X509_getm_notBefore(cert), -3600) != NULL &&
	    X509_gmtime_adj(X509_getm_notAfter(cert), 30L * 86400) != NULL &&
	    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
	    (const unsigned char *)host_name(), -1, -1, 0) == 1 && X509_set_issuer_name(cert, name) == 1 &&
	    X509_set_pubkey(cert, key) == 1 && X509_sign(cert, key, EVP_sha256()) > 0 &&
	    SSL_CTX_use_certificate(x->ctx, cert) == 1 && SSL_CTX_use_PrivateKey(x->ctx, key) == 1 &&
	    certificate_digest(cert, digest);

	if (good)
		print_hex(x->own_pin, digest, sizeof digest);
	else
		diag("no certificate could be made: %s", tls_error());
	X509_free(cert);
	EVP_PKEY_free(key);
	return good;
}

enum {
	EARLY_MAX = 14 << 10,   /* with the handshake, what the first window holds */
	RECORD_MAX = 32         /* what a record has beside its octets, at most */
};

/* NULL with a diagnostic. */
static struct tls_context *tls_server_context(void)
{
	static const unsigned char id[] = "bsmtp";
	struct tls_context *x = grow(NULL, sizeof *x);
	bool only = options.allow_count == 0 && options.users == NULL;

	memset(x, 0, sizeof *x);
	x->ctx = new_context(TLS_server_method());
	if (x->ctx == NULL || !(options.cert != NULL ? load_certificate(x->ctx) : make_certificate(x))) {
		tls_context_free(x);
		return NULL;
	}
	SSL_CTX_set_alpn_select_cb(x->ctx, select_alpn, NULL);
	(void)SSL_CTX_set_session_id_context(x->ctx, id, sizeof id - 1);
	if (options.early_data)         /* OpenSSL takes each ticket but once then */
		(void)SSL_CTX_set_max_early_data(x->ctx, EARLY_MAX);
	if (options.client_ca == NULL)
		return x;
	if (SSL_CTX_load_verify_locations(x->ctx, options.client_ca, NULL) != 1) {
		diag("%s: no certificates: %s", options.client_ca, tls_error());
		tls_context_free(x);
		return NULL;
	}
	SSL_CTX_set_client_CA_list(x->ctx, SSL_load_client_CA_file(options.client_ca));
	SSL_CTX_set_verify(x->ctx, SSL_VERIFY_PEER | (only ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0),
	    on_certificate);
	return x;
}

/* sha256:HEX, with or without colons between the octets. */
static bool parse_pin(const char *text, unsigned char pin[32])
{
	size_t n = 0;

	if (strncmp(text, "sha256:", 7) != 0)
		return false;
	for (text += 7; *text != '\0' && n < 64; text++) {
		const char *digits = "0123456789abcdef", *digit;
		if (*text == ':')
			continue;
		digit = strchr(digits, lower(*text));
		if (digit == NULL)
			return false;
		pin[n / 2] = (unsigned char)((n % 2 ? pin[n / 2] << 4 : 0) | (int)(digit - digits));
		n++;
	}
	return n == 64 && *text == '\0';
}

static bool is_pin(const char *text)
{
	unsigned char pin[32];

	return parse_pin(text, pin);
}

static int keep_ticket(SSL *ssl, SSL_SESSION *session);

static struct tls_context *tls_client_context(void)
{
	struct tls_context *x = grow(NULL, sizeof *x);
	bool good;

	memset(x, 0, sizeof *x);
	x->ctx = new_context(TLS_client_method());
	good = x->ctx != NULL;
	if (good && options.pin != NULL)
		good = x->pinned = parse_pin(options.pin, x->pin);
	if (good && options.cert != NULL)
		good = load_certificate(x->ctx);
	if (good && options.ca != NULL && SSL_CTX_load_verify_locations(x->ctx, options.ca, NULL) != 1) {
		diag("%s: no certificates: %s", options.ca, tls_error());
		good = false;
	} else if (good && options.ca == NULL) {
		good = SSL_CTX_set_default_verify_paths(x->ctx) == 1;
	}
	if (!good) {
		tls_context_free(x);
		return NULL;
	}
	SSL_CTX_set_verify(x->ctx, x->pinned || options.insecure ? SSL_VERIFY_NONE : SSL_VERIFY_PEER,
	    on_certificate);
	if (options.tickets != NULL) {
		(void)SSL_CTX_set_session_cache_mode(x->ctx, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
		SSL_CTX_sess_set_new_cb(x->ctx, keep_ticket);
	}
	return x;
}

/* ---- tickets: one file, one server ---- */

/* The file begins with a line that names the server; the session follows as PEM. */
static int keep_ticket(SSL *ssl, SSL_SESSION *session)
{
	struct fresh file = { .f = NULL };
	FILE *f = fresh_open(&file, options.tickets, 0600);

	if (f != NULL)
		fprintf(f, "%s\n", tls_of(ssl)->peer);
	if (f == NULL || !fresh_keep(&file, PEM_write_SSL_SESSION(f, session) == 1))
		diag("%s: the ticket could not be kept: %s", options.tickets, strerror(errno));
	return 0;
}

/* The pin instead of chain and name; true if it is right or was not asked for. */
static bool pin_good(const struct tls_context *x, const X509 *cert)
{
	unsigned char digest[32];

	return !x->pinned || (certificate_digest(cert, digest) &&
	    CRYPTO_memcmp(digest, x->pin, sizeof digest) == 0);
}

/* A session that is resumed is not verified again, and early data goes before its end:
 * it must have been, by this pin or for this name. */
static bool was_verified(const SSL *ssl, const struct tls_context *x, SSL_SESSION *session,
    const char *name)
{
	X509 *cert = SSL_SESSION_get0_peer(session);

	if (!pin_good(x, cert))
		return false;
	return SSL_get_verify_mode(ssl) == SSL_VERIFY_NONE || (cert != NULL &&
	    SSL_get_verify_result(ssl) == X509_V_OK &&
	    (X509_check_host(cert, name, 0, 0, NULL) == 1 || X509_check_ip_asc(cert, name, 0) == 1));
}

/* A ticket is a secret: a file that others may read is not used. */
static void use_ticket(SSL *ssl, const struct tls_context *x, const char *server,
    const char *name)
{
	FILE *f = open_own(options.tickets);
	SSL_SESSION *session = NULL;
	struct stat st;
	char line[512];

	if (f == NULL)
		return;
	if (fstat(fileno(f), &st) != 0 || (st.st_mode & 077) != 0 || st.st_uid != geteuid())
		diag("%s: not used: it must be yours, and nobody else's to read", options.tickets);
	else if (fgets(line, sizeof line, f) != NULL && same(trim(slice_of(line)), server))
		session = PEM_read_SSL_SESSION(f, NULL, NULL, NULL);
	(void)fclose(f);
	if (session != NULL && (SSL_set_session(ssl, session) != 1 || !was_verified(ssl, x, session, name)))
		(void)SSL_set_session(ssl, NULL);
	SSL_SESSION_free(session);
	ERR_clear_error();
}

/* How much may go as early data: by a ticket of a session that agreed to BSMTP. */
static size_t early_room(const SSL *ssl)
{
	const SSL_SESSION *session = SSL_get0_session(ssl);
	const unsigned char *name = NULL;
	size_t len = 0;

	if (!options.early_data || session == NULL)
		return 0;
	SSL_SESSION_get0_alpn_selected(session, &name, &len);
	if (len != sizeof alpn_bsmtp - 1 || memcmp(name, alpn_bsmtp + 1, len) != 0)
		return 0;
	return min_size(SSL_SESSION_get_max_early_data(session), EARLY_MAX);
}

/* ---- sessions of TLS ---- */

/* Octets that were read in the clear and are TLS already come before the socket's. */
static BIO *source_bio(int fd, struct bsmtp_slice held)
{
	BIO *socket = BIO_new_socket(fd, BIO_NOCLOSE), *buffer;

	if (socket == NULL || held.len == 0)
		return socket;
	buffer = BIO_new(BIO_f_buffer());
	if (buffer == NULL || BIO_set_buffer_read_data(buffer, (void *)(uintptr_t)held.at, (long)held.len) != 1) {
		BIO_free(buffer);
		BIO_free(socket);
		return NULL;
	}
	return BIO_push(buffer, socket);
}

static void link_end_tls(struct link *k)
{
	if (k->tls == NULL)
		return;
	SSL_free(k->tls->ssl);
	if (k->tls->kept != NULL)
		OPENSSL_cleanse(k->tls->kept, k->tls->kept_len);
	free(k->tls->kept);
	free(k->tls);
	k->tls = NULL;
}

static bool link_new_tls(struct link *k, struct tls_context *x, bool server)
{
	k->tls = grow(NULL, sizeof *k->tls);
	memset(k->tls, 0, sizeof *k->tls);
	k->tls->server = server;
	k->tls->reads = POLLIN;
	k->tls->writes = POLLOUT;
	k->tls->ssl = SSL_new(x->ctx);
	if (k->tls->ssl == NULL || SSL_set_app_data(k->tls->ssl, k->tls) != 1)
		link_end_tls(k);
	return k->tls != NULL;
}

/* The server's side; `held` was read already.  `may`: BSMTP may be agreed to by ALPN. */
static bool link_accept_tls(struct link *k, struct tls_context *x, struct bsmtp_slice held, bool may)
{
	BIO *from = source_bio(k->in, held), *to = BIO_new_socket(k->out, BIO_NOCLOSE);

	if (from == NULL || to == NULL || !link_new_tls(k, x, true)) {
		BIO_free_all(from);
		BIO_free(to);
		return false;
	}
	SSL_set_bio(k->tls->ssl, from, to);
	SSL_set_accept_state(k->tls->ssl);
	k->tls->may = may;
	k->tls->early = options.early_data && options.tls;
	return true;
}

/* Counts flights, and those that were answered. */
static void count_flights(int sent, int version, int type, const void *at, size_t len, SSL *ssl,
    void *context)
{
	struct tls *t = context;

	(void)version, (void)at, (void)len, (void)ssl;
	if (type != SSL3_RT_HANDSHAKE)
		return;
	if (!sent)
		t->answered = t->flights;
	else if (t->flights == t->answered)
		t->flights++;
}

/* The client's side.  `name` is what the certificate must be for; `server` names the
 * peer for tickets and must outlive the link.  `gated`: the first flight goes out now,
 * and what comes is not TLS before link_open_gate(). */
static bool link_connect_tls(struct link *k, struct tls_context *x, const char *name,
    const char *server, bool alpn, bool gated)
{
	unsigned char address[16];
	bool literal = inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1;
	BIO *from = gated ? BIO_new(BIO_s_mem()) : source_bio(k->in, slice("", 0));
	BIO *to = BIO_new_socket(k->out, BIO_NOCLOSE), *flight;

	if (from == NULL || to == NULL || !link_new_tls(k, x, false)) {
		BIO_free_all(from);
		BIO_free(to);
		return false;
	}
	SSL_set_bio(k->tls->ssl, from, to);
	SSL_set_connect_state(k->tls->ssl);
	SSL_set_msg_callback(k->tls->ssl, count_flights);
	SSL_set_msg_callback_arg(k->tls->ssl, k->tls);
	k->tls->peer = server;
	/* A name that is not asked for would be any. */
	if (literal ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(k->tls->ssl), name) != 1 :
	    SSL_set1_host(k->tls->ssl, name) != 1 || SSL_ctrl(k->tls->ssl,
	    SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, (void *)(uintptr_t)name) != 1) {
		link_end_tls(k);
		return false;
	}
	if (alpn)
		(void)SSL_set_alpn_protos(k->tls->ssl, alpn_bsmtp, sizeof alpn_bsmtp);
	if (options.tickets != NULL)
		use_ticket(k->tls->ssl, x, server, name);
	k->tls->early_left = alpn && !gated ? early_room(k->tls->ssl) : 0;
	flight = k->tls->early_left > 0 ? BIO_new(BIO_s_mem()) : NULL;
	k->tls->early = flight != NULL;
	if (flight != NULL)
		SSL_set0_wbio(k->tls->ssl, flight);
	k->tls->gated = gated;
	if (gated)
		(void)SSL_do_handshake(k->tls->ssl);
	ERR_clear_error();
	return true;
}

static bool link_open_gate(struct link *k, struct bsmtp_slice held)
{
	BIO *from = source_bio(k->in, held);

	if (from == NULL)
		return false;
	SSL_set0_rbio(k->tls->ssl, from);
	k->tls->gated = false;
	return true;
}

/* Goes on with the handshake: 1 when it is complete, LINK_AGAIN, LINK_FAILED. */
static ssize_t link_handshake(struct link *k)
{
	struct tls *t = k->tls;
	ssize_t n;

	ERR_clear_error();
	errno = 0;
	n = tls_result(t, SSL_do_handshake(t->ssl), &t->reads, POLLIN);
	t->writes = POLLOUT;
	t->dry = n == LINK_AGAIN;
	if (n == 0) {
		tls_fail(t, "the peer closed");
		t->cut = true;
		n = LINK_FAILED;
	}
	t->done = n > 0;
	if (n > 0 && t->early && SSL_get_early_data_status(t->ssl) == SSL_EARLY_DATA_ACCEPTED)
		t->kept_sent = t->kept_len;
	t->early = t->early && n == LINK_AGAIN;
	return n;
}

/* Whether octets may be written though the handshake is not complete. */
static bool link_early(const struct link *k)
{
	return k->tls != NULL && k->tls->early;
}

/* Server: early data, in the clear now; 0 at its end: the handshake goes on. */
static ssize_t link_read_early(struct link *k, char *in, size_t len)
{
	struct tls *t = k->tls;
	size_t n = 0;
	ssize_t result;

	ERR_clear_error();
	errno = 0;
	switch (SSL_read_early_data(t->ssl, in, len, &n)) {
	case SSL_READ_EARLY_DATA_SUCCESS:
		return (ssize_t)n;
	case SSL_READ_EARLY_DATA_FINISH:
		t->early = false;
		return 0;
	default:
		result = tls_result(t, 0, &t->reads, POLLIN);
		t->dry = result == LINK_AGAIN;
		return result == 0 ? LINK_FAILED : result;
	}
}

/* The client keeps what it sends so; the server sends to one whose Finished is still
 * to come. */
static ssize_t write_early(struct tls *t, const char *out, size_t len)
{
	size_t n = 0;

	if (!t->server) {
		len = min_size(len, t->early_left);
		if (t->kept == NULL)
			t->kept = grow(NULL, EARLY_MAX);
	}
	if (len == 0)
		return LINK_AGAIN;
	ERR_clear_error();
	errno = 0;
	if (SSL_write_early_data(t->ssl, out, len, &n) != 1) {
		ssize_t result = tls_result(t, 0, &t->writes, POLLOUT);
		return result == 0 ? LINK_FAILED : result;
	}
	if (!t->server) {
		memcpy(t->kept + t->kept_len, out, n);
		t->kept_len += n;
		/* A server that skips it counts what is around it, too. */
		t->early_left -= min_size(n + RECORD_MAX, t->early_left);
	}
	return (ssize_t)n;
}

/* Client: the first flight with the early data was gathered, so that one write, or a SYN,
 * can take it; the handshake goes on when all is gone: 0. */
static ssize_t link_send_flight(struct link *k)
{
	char *flight;
	size_t len = (size_t)BIO_get_mem_data(SSL_get_wbio(k->tls->ssl), &flight);
	BIO *to;

	while (k->tls->flight_sent < len) {
		ssize_t n = link_result(write(k->out, flight + k->tls->flight_sent,
		    min_size(len - k->tls->flight_sent, IO_MAX)));
		if (n < 0)
			return n;
		k->tls->flight_sent += (size_t)n;
	}
	to = BIO_new_socket(k->out, BIO_NOCLOSE);
	if (to != NULL)
		SSL_set0_wbio(k->tls->ssl, to);
	return to != NULL ? 0 : LINK_FAILED;
}

/* Early data that the server did not take: once more, 0 when all is gone. */
static ssize_t link_send_again(struct link *k)
{
	struct tls *t = k->tls;

	while (t->kept_sent < t->kept_len) {
		ssize_t n = tls_result(t, SSL_write(t->ssl, t->kept + t->kept_sent,
		    (int)(t->kept_len - t->kept_sent)), &t->writes, POLLOUT);
		if (n <= 0)
			return n == 0 ? LINK_FAILED : n;
		t->kept_sent += (size_t)n;
	}
	return 0;
}

static bool link_sent_early(const struct link *k)
{
	return k->tls->kept_len > 0;
}

static bool link_early_taken(const struct link *k)
{
	return SSL_get_early_data_status(k->tls->ssl) == SSL_EARLY_DATA_ACCEPTED;
}

/* How often the handshake has waited, or waits, for the peer. */
static unsigned link_tls_turns(const struct link *k)
{
	return k->tls->done ? k->tls->answered : k->tls->flights;
}

static const char *link_tls_why(const struct link *k)
{
	return k->tls != NULL ? k->tls->why : "";
}

/* Whether the connection ended, and TLS failed for that alone. */
static bool link_was_cut(const struct link *k)
{
	return k->tls != NULL && k->tls->cut;
}

/* Not empty: the peer does not accept our certificate. */
static const char *link_tls_hint(const struct link *k)
{
	return k->tls != NULL && k->tls->hint != NULL ? k->tls->hint : "";
}

/* The protocol's version, NULL in the clear. */
static const char *link_version(const struct link *k)
{
	return k->tls != NULL && k->tls->done ? SSL_get_version(k->tls->ssl) : NULL;
}

static bool link_agreed(const struct link *k)
{
	const unsigned char *name = NULL;
	unsigned len = 0;

	if (k->tls == NULL)
		return false;
	SSL_get0_alpn_selected(k->tls->ssl, &name, &len);
	return len == sizeof alpn_bsmtp - 1 && memcmp(name, alpn_bsmtp + 1, len) == 0;
}

static bool link_resumed(const struct link *k)
{
	return k->tls != NULL && SSL_session_reused(k->tls->ssl) == 1;
}

/* Whether the peer has shown a certificate that was asked for, and is good. */
static bool link_peer_certified(const struct link *k)
{
	return k->tls != NULL && SSL_get0_peer_certificate(k->tls->ssl) != NULL &&
	    SSL_get_verify_result(k->tls->ssl) == X509_V_OK;
}

/* What would mend a certificate that is not accepted. */
static const char *certificate_hint(long result)
{
	static const struct {
		long result;
		const char *hint;
	} hints[] = {
		{ X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT, "give --ca FILE, or its --pin" },
		{ X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN, "give that authority with --ca FILE" },
		{ X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY, "give its authority with --ca FILE" },
		{ X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE, "give its authority with --ca FILE" },
		{ X509_V_ERR_CERT_HAS_EXPIRED, "the server needs a new one" },
		{ X509_V_ERR_CERT_NOT_YET_VALID, "is a clock wrong?" },
		{ X509_V_ERR_HOSTNAME_MISMATCH, "if that is the peer, say so with --tls-name" },
		{ X509_V_ERR_IP_ADDRESS_MISMATCH, "if that is the peer, say so with --tls-name" },
	};

	for (size_t i = 0; i < COUNT(hints); i++)
		if (hints[i].result == result)
			return hints[i].hint;
	return "see the certificate with openssl s_client";
}

/* Says why there is no TLS, and which certificate is to blame. */
static void diag_tls(const struct link *k, const char *peer)
{
	long result = SSL_get_verify_result(k->tls->ssl);

	if (k->tls->done || result == X509_V_OK) {
		diag("%s: TLS: %s%s", peer, k->tls->why, link_tls_hint(k));
		return;
	}
	diag("%s: the certificate of %s is not accepted: %s (%s)", peer, k->tls->subject,
	    X509_verify_cert_error_string(result), certificate_hint(result));
}

static bool link_pin_good(const struct link *k, const struct tls_context *x)
{
	return pin_good(x, SSL_get0_peer_certificate(k->tls->ssl));
}

/* All records that have come and fit: one at a time, each would get a reply of its
 * own.  What ends the session behind them is told at the next call, by OpenSSL again. */
static ssize_t tls_read(struct link *k, char *in, size_t len)
{
	size_t got = 0;
	ssize_t n;

	do {
		ERR_clear_error();
		errno = 0;
		n = tls_result(k->tls, SSL_read(k->tls->ssl, in + got, (int)(len - got)),
		    &k->tls->reads, POLLIN);
		got += n > 0 ? (size_t)n : 0;
	} while (n > 0 && got < len && SSL_has_pending(k->tls->ssl));
	k->tls->dry = n == LINK_AGAIN;
	k->tls->over = got > 0 && (n == 0 || n == LINK_FAILED);
	return got > 0 ? (ssize_t)got : n;
}

static ssize_t tls_write(struct link *k, const char *out, size_t len)
{
	ssize_t n;

	if (!k->tls->done && (k->tls->early || k->tls->server))
		return write_early(k->tls, out, len);
	ERR_clear_error();
	errno = 0;
	n = tls_result(k->tls, SSL_write(k->tls->ssl, out, (int)len), &k->tls->writes, POLLOUT);
	return n == 0 ? LINK_FAILED : n;
}

/* close_notify: the peer is told that the end is no accident. */
static void tls_finish(struct link *k)
{
	if (k->tls->done)
		(void)SSL_shutdown(k->tls->ssl);
	ERR_clear_error();
}

static bool is_tls(const struct link *k)
{
	return k->tls != NULL && !k->tls->gated;
}

/* Octets that poll() does not know of; a part of a record alone is none. */
static bool link_pending(const struct link *k)
{
	return is_tls(k) && !k->tls->dry && (k->tls->over || SSL_has_pending(k->tls->ssl) ||
	    BIO_ctrl_pending(SSL_get_rbio(k->tls->ssl)) > 0);
}

static short tls_events(const struct link *k, bool in, bool out)
{
	return (short)((in ? k->tls->reads : 0) | (out ? k->tls->writes : 0));
}

static void wipe(void *memory, size_t size)
{
	OPENSSL_cleanse(memory, size);
}

/* ---- passwords at rest ---- */

enum { SALT_SIZE = 16, HASH_SIZE = 32, SCRYPT_N = 1 << 14, SCRYPT_R = 8, SCRYPT_P = 1 };

/* The schemes: what a line of the accounts file may have in braces. */
static bool hash_scrypt(uint64_t cost, const char *secret, size_t len, const unsigned char *salt,
    unsigned char *hash)
{
	return EVP_PBE_scrypt(secret, len, salt, SALT_SIZE, cost, SCRYPT_R, SCRYPT_P, 0, hash,
	    HASH_SIZE) == 1;
}

static bool hash_pbkdf2(uint64_t cost, const char *secret, size_t len, const unsigned char *salt,
    unsigned char *hash)
{
	return cost <= INT_MAX && PKCS5_PBKDF2_HMAC(secret, (int)len, salt, SALT_SIZE, (int)cost,
	    EVP_sha256(), HASH_SIZE, hash) == 1;
}

static const struct scheme {
	const char *name;
	uint64_t cost;          /* of new ones */
	uint64_t most;          /* that is computed: a bound on time and memory */
	bool (*hash)(uint64_t cost, const char *secret, size_t len, const unsigned char *salt,
	    unsigned char *hash);
} schemes[] = {
	{ "{SCRYPT}", SCRYPT_N, 1 << 15, hash_scrypt },
	{ "{PBKDF2-SHA256}", 600000, 10000000, hash_pbkdf2 },
};

/* {SCHEME}cost$salt$hash, in base64. */
static bool password_make(char *out, size_t size, const char *secret, size_t len)
{
	unsigned char salt[SALT_SIZE], hash[HASH_SIZE];
	struct text t = { out, 0, size - 1 };

	if (RAND_bytes(salt, sizeof salt) != 1 ||
	    !schemes[0].hash(schemes[0].cost, secret, len, salt, hash))
		return false;
	put_string(&t, schemes[0].name);
	put_number(&t, schemes[0].cost);
	put_string(&t, "$");
	put_base64(&t, slice((const char *)salt, sizeof salt));
	put_string(&t, "$");
	put_base64(&t, slice((const char *)hash, sizeof hash));
	out[t.len] = '\0';
	return true;
}

/* The parts of a line's hash; NULL where it is none. */
static const struct scheme *password_parse(const char *text, uint64_t *cost, unsigned char *salt,
    unsigned char *hash)
{
	char octets[64] = "";

	for (size_t i = 0; i < COUNT(schemes); i++) {
		size_t n = strlen(schemes[i].name);
		const char *first, *second;
		struct text t = { octets, 0, sizeof octets };
		ptrdiff_t used;
		if (strncmp(text, schemes[i].name, n) != 0)
			continue;
		text += n;
		used = bsmtp_number_parse(cost, text, strlen(text));
		first = used > 0 ? strchr(text, '$') : NULL;
		second = first != NULL ? strchr(first + 1, '$') : NULL;
		if (second == NULL || first != text + used || *cost == 0 || *cost > schemes[i].most ||
		    !take_base64(&t, slice(first + 1, (size_t)(second - first) - 1)) || t.len != SALT_SIZE ||
		    !take_base64(&t, slice_of(second + 1)) || t.len != SALT_SIZE + HASH_SIZE)
			return NULL;
		memcpy(salt, octets, SALT_SIZE);
		memcpy(hash, octets + SALT_SIZE, HASH_SIZE);
		return &schemes[i];
	}
	return NULL;
}

static bool password_valid(const char *text)
{
	unsigned char salt[SALT_SIZE], hash[HASH_SIZE];
	uint64_t cost;

	return password_parse(text, &cost, salt, hash) != NULL;
}

static bool password_matches(const char *text, const char *secret, size_t len)
{
	unsigned char salt[SALT_SIZE], hash[HASH_SIZE], made[HASH_SIZE];
	uint64_t cost;
	const struct scheme *scheme = password_parse(text, &cost, salt, hash);

	return scheme != NULL && scheme->hash(cost, secret, len, salt, made) &&
	    CRYPTO_memcmp(hash, made, HASH_SIZE) == 0;
}
#endif

#ifdef BSMTP_NO_TLS
/* Without OpenSSL no option asks for TLS, and no link ever has it. */
struct tls_context {
	bool pinned;
	char own_pin[65];
};

static struct tls_context *tls_server_context(void) { return NULL; }
static struct tls_context *tls_client_context(void) { return NULL; }
static void tls_context_free(struct tls_context *x) { (void)x; }
static void link_end_tls(struct link *k) { (void)k; }
static bool link_accept_tls(struct link *k, struct tls_context *x, struct bsmtp_slice held, bool may) { (void)k; (void)x; (void)held; return may && false; }
static bool link_connect_tls(struct link *k, struct tls_context *x, const char *name, const char *server, bool alpn, bool gated) { (void)k; (void)x; (void)name; (void)server; return alpn && gated && false; }
static bool link_open_gate(struct link *k, struct bsmtp_slice held) { (void)k; (void)held; return false; }
static ssize_t link_handshake(struct link *k) { (void)k; return LINK_FAILED; }
static unsigned link_tls_turns(const struct link *k) { (void)k; return 0; }
static const char *link_tls_why(const struct link *k) { (void)k; return ""; }
static bool link_was_cut(const struct link *k) { (void)k; return false; }
static const char *link_tls_hint(const struct link *k) { (void)k; return ""; }
static const char *link_version(const struct link *k) { (void)k; return NULL; }
static bool link_agreed(const struct link *k) { (void)k; return false; }
static bool link_peer_certified(const struct link *k) { (void)k; return false; }
static void diag_tls(const struct link *k, const char *peer) { (void)k; (void)peer; }
static bool link_early(const struct link *k) { (void)k; return false; }
static ssize_t link_send_flight(struct link *k) { (void)k; return 0; }
static ssize_t link_read_early(struct link *k, char *in, size_t len) { (void)k; (void)in; (void)len; return LINK_FAILED; }
static ssize_t link_send_again(struct link *k) { (void)k; return 0; }
static bool link_sent_early(const struct link *k) { (void)k; return false; }
static bool link_early_taken(const struct link *k) { (void)k; return false; }
static bool link_resumed(const struct link *k) { (void)k; return false; }
static bool link_pin_good(const struct link *k, const struct tls_context *x) { (void)k; (void)x; return true; }
static ssize_t tls_read(struct link *k, char *in, size_t len) { (void)k; (void)in; (void)len; return LINK_FAILED; }
static ssize_t tls_write(struct link *k, const char *out, size_t len) { (void)k; (void)out; (void)len; return LINK_FAILED; }
static void tls_finish(struct link *k) { (void)k; }
static bool link_pending(const struct link *k) { (void)k; return false; }
static bool is_tls(const struct link *k) { (void)k; return false; }
static short tls_events(const struct link *k, bool in, bool out) { (void)k; return in && out ? 0 : 0; }
static void wipe(void *memory, size_t size) { memset(memory, 0, size); }
static bool is_pin(const char *text) { return *text != '\0'; }
static bool password_make(char *out, size_t size, const char *secret, size_t len) { (void)out; (void)size; (void)secret; (void)len; return false; }
static bool password_valid(const char *text) { (void)text; return false; }
static bool password_matches(const char *text, const char *secret, size_t len) { (void)text; (void)secret; (void)len; return false; }
#endif

/* ---- reading and writing ---- */

/* As link_result() has it. */
static ssize_t link_read(struct link *k, char *in, size_t len)
{
	len = min_size(len, IO_MAX);
	return is_tls(k) ? tls_read(k, in, len) : link_result(read(k->in, in, len));
}

static ssize_t link_write(struct link *k, const char *out, size_t len)
{
	len = min_size(len, IO_MAX);
	return is_tls(k) ? tls_write(k, out, len) : link_result(write(k->out, out, len));
}

enum { TLS_RECORD = 16 << 10 };         /* its octets, at most: RFC 8446, 5.1 */

/* Lets several writes go out in full packets, not each record in some of its own: over
 * TLS it saves 7 % of the client's time. */
static void link_hold(const struct link *k, bool on)
{
#ifdef TCP_CORK
	int value = on;

	(void)setsockopt(k->out, IPPROTO_TCP, TCP_CORK, &value, sizeof value);
#else
	(void)k;
	(void)on;
#endif
}

/* What poll() is to wait for on `in`; with TLS, reading may need to write. */
static short link_events(const struct link *k, bool in, bool out)
{
	return is_tls(k) ? tls_events(k, in, out) : (short)((in ? POLLIN : 0) | (out ? POLLOUT : 0));
}

/* The peer is told that no more comes; what it says is still read. */
static void link_finish(struct link *k)
{
	if (is_tls(k))
		tls_finish(k);
	if (k->in == k->out) {
		(void)shutdown(k->out, SHUT_WR);
	} else if (k->out >= 0) {
		close(k->out);
		k->out = -1;
	}
}

static void link_close(struct link *k)
{
	link_end_tls(k);
	if (k->out >= 0 && k->out != k->in)
		close(k->out);
	if (k->in >= 0)
		close(k->in);
	k->in = k->out = -1;
}

/* TCP Fast Open (RFC 7413): the first octets go in the SYN, where the system can and
 * knows the server's cookie. */
static void hasten(int fd, bool listening)
{
	int length = listening ? 256 : 1;

#if defined(__linux__) && defined(TCP_FASTOPEN) && defined(TCP_FASTOPEN_CONNECT)
	(void)setsockopt(fd, IPPROTO_TCP, listening ? TCP_FASTOPEN : TCP_FASTOPEN_CONNECT, &length,
	    sizeof length);
#elif defined(TCP_FASTOPEN)
	if (listening)
		(void)setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN, &length, sizeof length);
#else
	(void)fd;
	(void)length;
#endif
}

/* A SYN, and the octets in it, may come twice.  Where it cannot be told, it may be so. */
static bool link_had_syn_data(const struct link *k)
{
#if defined(__linux__) && defined(TCP_INFO)
	enum { SYN_DATA = 32 };         /* TCPI_OPT_SYN_DATA, of the kernel's own header */
	struct tcp_info info;
	socklen_t len = sizeof info;

	return options.fastopen && getsockopt(k->in, IPPROTO_TCP, TCP_INFO, &info, &len) == 0 &&
	    (info.tcpi_options & SYN_DATA) != 0;
#else
	(void)k;
	return options.fastopen;
#endif
}

static int start_connect(const struct sockaddr *sa, socklen_t len, bool fast)
{
	int fd = socket(sa->sa_family, SOCK_STREAM, 0), saved;

	if (fd < 0)
		return -1;
	if (fast && sa->sa_family != AF_UNIX)
		hasten(fd, false);
	if (set_flags(fd) && (connect(fd, sa, len) == 0 || errno == EINPROGRESS))
		return fd;
	saved = errno;
	close(fd);
	errno = saved;
	return -1;
}

enum { TRIES = 16, STAGGER_US = 250000 };

/* Attempts to connect that are under way. */
struct tries {
	struct pollfd polls[TRIES];
	int64_t begun_us[TRIES];
	nfds_t count;
	int error;              /* of the last one that failed */
	bool fast;
};

static void begin_try(struct tries *t, const struct addrinfo *address)
{
	int fd;

	t->begun_us[t->count] = now_us();
	fd = start_connect(address->ai_addr, address->ai_addrlen, t->fast);
	if (fd < 0) {
		t->error = errno;
		return;
	}
	t->polls[t->count++] = (struct pollfd){ fd, POLLOUT, 0 };
}

/* Looks at those that poll() has named: the socket that is connected, or -1. */
static int end_tries(struct tries *t, int64_t *took_us)
{
	for (nfds_t i = 0; i < t->count; i++) {
		socklen_t len = sizeof t->error;
		int said = 0, fd = t->polls[i].fd;
		if (t->polls[i].revents == 0)
			continue;
		if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &said, &len) != 0)
			said = errno;
		t->polls[i] = t->polls[--t->count];
		*took_us = now_us() - t->begun_us[i];
		t->begun_us[i--] = t->begun_us[t->count];
		if (said == 0)
			return fd;
		t->error = said;
		close(fd);
	}
	return -1;
}

/* Tries all addresses, a new one each 250 ms and whenever one fails, in the
 * manner of RFC 8305; the first that answers wins, and *took_us is its time.  `fast`:
 * we shall speak first, so that what we say may go in the SYN.
 * Returns a socket, or -1 with errno. */
static int connect_any(const struct addrinfo *next, int64_t timeout_us, bool fast, int64_t *took_us)
{
	struct tries t = { .count = 0, .error = ETIMEDOUT, .fast = fast };
	int64_t end = now_us() + timeout_us, start_next = 0, now;
	int won = -1;

	while (won < 0 && (now = now_us()) < end && (next != NULL || t.count > 0)) {
		int64_t until = next != NULL && start_next < end ? start_next : end;
		nfds_t before = t.count;
		if (next != NULL && t.count < TRIES && (now >= start_next || t.count == 0)) {
			begin_try(&t, next);
			next = next->ai_next;
			start_next = now + STAGGER_US;
			continue;
		}
		if (poll(t.polls, t.count, (int)((until - now) / 1000) + 1) < 0 && errno != EINTR)
			break;
		won = end_tries(&t, took_us);
		if (t.count < before)
			start_next = 0;
	}
	for (nfds_t i = 0; i < t.count; i++)
		close(t.polls[i].fd);
	errno = t.error;
	return won;
}

static int resolve(const struct address *a, bool passive, struct addrinfo **found)
{
	struct addrinfo hints;

	memset(&hints, 0, sizeof hints);
	hints.ai_family = options.family;
	hints.ai_socktype = SOCK_STREAM;
	hints.ai_flags = passive ? AI_PASSIVE : 0;
	return getaddrinfo(a->host, a->port, &hints, found);
}

/* A pipe within this process, to wake a poll(). */
static bool make_pipe(int ends[2])
{
	return pipe(ends) == 0 && fcntl(ends[0], F_SETFD, FD_CLOEXEC) == 0 &&
	    fcntl(ends[1], F_SETFD, FD_CLOEXEC) == 0 && fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0 &&
	    fcntl(ends[1], F_SETFL, O_NONBLOCK) == 0;
}

/* ==== 9 sources ========================================================== */

enum { HEAD_MAX = 256 << 10 };

enum got { GOT_DATA, GOT_WAIT, GOT_END, GOT_ERROR };

/* Who a message is from and to, as a batch has it: addresses, and beside each the
 * parameters that stood behind it. */
struct envelope {
	char *from, *parameters;
	struct list to, to_parameters;
	size_t weight;                  /* octets of memory it takes */
};

/* What one envelope may take: a batch is hostile too. */
enum { ENVELOPE_MAX = 1 << 20 };

/* Messages out of the operands, one after the other.  The window is what was
 * read and not yet used; the head is a copy of the message's header, which is
 * looked at before anything of it is sent. */
struct source {
	size_t operand;
	int fd;
	bool opened, regular, eof, in_message, head_done, head_long, ended;
	bool failed;                    /* the message breaks off */
	bool alone;                     /* no operand follows what is open */
	bool at_line;                   /* sendmail: a line begins */
	enum format format;
	char name[1024];
	DIR *dir;
	char dir_path[1000];
	int dir_stage;
	struct bsmtp_mbox mbox;
	struct bsmtp_batch batch;
	struct envelope envelope;       /* of the next message, where a batch has it */
	uint64_t limit, taken;          /* regular: how many octets it had, and were read */
	uint64_t offset;                /* of window[start] in the file */
	uint64_t passed;                /* octets of the files before it */
	size_t start, end;
	struct bsmtp_slice text;        /* of the message, in the window */
	/* the message */
	uint64_t message_offset, size;
	char sender[BSMTP_FROM_LINE_MAX];
	bool has_sender;
	size_t head_len, head_given, head_scan;
	char *head;                     /* HEAD_MAX */
	char *window;                   /* WINDOW_SIZE */
	int status;                     /* the worst exit status so far */
};

static void worst(int *status, int other);

static const char *shown(const char *name)
{
	return strcmp(name, "-") == 0 ? "standard input" : name;
}

static void input_error(struct source *s, int status, const char *why)
{
	diag("%s: %s", shown(s->name), why);
	worst(&s->status, status);
}

static void source_close(struct source *s)
{
	if (s->opened && s->fd > STDIN_FILENO)
		close(s->fd);
	s->opened = false;
}

static void envelope_free(struct envelope *e)
{
	free(e->from);
	free(e->parameters);
	list_free(&e->to);
	list_free(&e->to_parameters);
	memset(e, 0, sizeof *e);
}

/* How much of a regular file there is to read.  Whoever appends to it holds a lock meanwhile
 * (fcntl(2)): once that is free the file is whole, and what comes later is not for this run.
 * A file whose size is not known, as in /proc, is read to its end. */
static int source_measure(struct source *s, int fd, struct stat *st)
{
	off_t at;

	if (fd < 0 || fstat(fd, st) != 0)
		return -1;
	s->limit = s->taken = 0;
	if (!S_ISREG(st->st_mode))
		return 0;
	if (await_lock(fd, F_RDLCK) != 0 && (errno == EACCES || errno == EAGAIN))
		return -1;
	at = lseek(fd, 0, SEEK_CUR);
	if (fstat(fd, st) != 0)
		return -1;
	(void)lock_file(fd, F_UNLCK);   /* nobody waits for us */
	s->limit = st->st_size > at ? (uint64_t)(st->st_size - at) : 0;
	return 0;
}

static bool source_start(struct source *s, int fd)
{
	struct stat st;

	if (source_measure(s, fd, &st) != 0) {
		bool locked = fd >= 0 && (errno == EACCES || errno == EAGAIN);
		input_error(s, locked ? EX_TEMPFAIL : EX_NOINPUT, locked ? "another process has locked it" :
		    strerror(errno));
		if (fd > STDIN_FILENO)
			close(fd);
		return false;
	}
	s->fd = fd;
	s->opened = true;
	s->regular = S_ISREG(st.st_mode);
	s->size = s->regular ? (uint64_t)st.st_size : 0;
	s->eof = s->in_message = s->ended = s->failed = false;
	s->passed += s->offset;
	s->offset = 0;
	s->start = s->end = 0;
	s->text.len = 0;
	memset(&s->mbox, 0, sizeof s->mbox);
	memset(&s->batch, 0, sizeof s->batch);
	s->mbox.mboxo = options.mboxo;
	envelope_free(&s->envelope);
	return true;
}

/* The next file of the Maildir under way: cur, then new. */
static bool next_in_maildir(struct source *s)
{
	static const char *const stages[] = { "cur", "new" };

	while (s->dir != NULL || s->dir_stage < 2) {
		struct dirent *entry;
		char path[sizeof s->dir_path + 4];
		struct stat st;
		if (s->dir == NULL) {
			snprintf(path, sizeof path, "%s/%s", s->dir_path, stages[s->dir_stage++]);
			s->dir = opendir(path);
			if (s->dir == NULL && errno != ENOENT) {
				snprintf(s->name, sizeof s->name, "%s", path);
				input_error(s, EX_NOINPUT, strerror(errno));
			}
			continue;
		}
		errno = 0;
		entry = readdir(s->dir);
		if (entry == NULL) {
			closedir(s->dir);
			s->dir = NULL;
			continue;
		}
		if (entry->d_name[0] == '.')
			continue;
		if ((size_t)snprintf(s->name, sizeof s->name, "%s/%s/%s", s->dir_path,
		    stages[s->dir_stage - 1], entry->d_name) >= sizeof s->name)
			continue;
		s->format = FORMAT_MESSAGE;
		if (stat(s->name, &st) == 0 && !S_ISREG(st.st_mode))
			input_error(s, EX_DATAERR, "no regular file");
		else if (source_start(s, open(s->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK)))
			return true;
	}
	return false;
}

static bool is_directory(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* A Maildir is a folder that has cur or new. */
static void open_maildir(struct source *s, const char *path)
{
	char sub[1100];
	bool is = false;

	snprintf(s->dir_path, sizeof s->dir_path, "%s", path);
	snprintf(sub, sizeof sub, "%s/cur", path);
	is = is_directory(sub);
	snprintf(sub, sizeof sub, "%s/new", path);
	is = is || is_directory(sub);
	s->dir_stage = is ? 0 : 2;
	if (!is)
		input_error(s, options.format == FORMAT_MAILDIR && !is_directory(path) ?
		    EX_NOINPUT : EX_DATAERR, "no Maildir: it has neither cur nor new");
}

static bool source_open(struct source *s)
{
	size_t count = options.operands.count > 0 ? options.operands.count : 1;

	for (;;) {
		const char *path;
		if (next_in_maildir(s))
			return true;
		if (s->operand == count || s->alone)
			return false;
		path = options.operands.count > 0 ? options.operands.items[s->operand] : "-";
		s->operand++;
		snprintf(s->name, sizeof s->name, "%s", path);
		s->format = (enum format)options.format;
		if (strcmp(path, "-") == 0) {
			if (source_start(s, STDIN_FILENO))
				return true;
		} else if (is_directory(path) || s->format == FORMAT_MAILDIR) {
			open_maildir(s, path);
		} else if (source_start(s, open(path, O_RDONLY | O_CLOEXEC))) {
			return true;
		}
	}
}

/* Reads once, where that does not block. */
static enum got source_fill(struct source *s)
{
	struct pollfd p = { s->fd, POLLIN, 0 };
	size_t room;
	ssize_t n;

	if (s->start > 0 && (s->start == s->end || s->end == WINDOW_SIZE)) {
		memmove(s->window, s->window + s->start, s->end - s->start);
		s->end -= s->start;
		s->start = 0;
	}
	if (!s->regular && poll(&p, 1, 0) == 0)
		return GOT_WAIT;
	room = min_size(WINDOW_SIZE - s->end, IO_MAX);
	if (s->limit > 0 && s->limit - s->taken < room)
		room = (size_t)(s->limit - s->taken);
	n = read(s->fd, s->window + s->end, room);
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return GOT_WAIT;
	if (n < 0) {
		input_error(s, EX_NOINPUT, strerror(errno));
		return GOT_ERROR;
	}
	if (n == 0 && s->taken < s->limit) {
		input_error(s, EX_NOINPUT, "it has become shorter while it was read");
		return GOT_ERROR;
	}
	s->eof = n == 0;
	s->end += (size_t)n;
	s->taken += (uint64_t)n;
	return GOT_DATA;
}

static void source_use(struct source *s, size_t n)
{
	s->start += n;
	s->offset += n;
}

/* Sees to it that the window holds octets; GOT_END where the file does not. */
static enum got need_octets(struct source *s)
{
	enum got got = GOT_DATA;

	while (s->start == s->end && !s->eof && got == GOT_DATA)
		got = source_fill(s);
	return got != GOT_DATA || s->start < s->end ? got : GOT_END;
}

/* ---- formats ---- */

static enum got begin_message(struct source *s)
{
	s->message_offset = s->offset;
	return need_octets(s);
}

/* The rest of the file, as it is read. */
static enum got text_of_message(struct source *s)
{
	enum got got = need_octets(s);

	if (got == GOT_DATA) {
		s->text = slice(s->window + s->start, s->end - s->start);
		source_use(s, s->text.len);
	}
	return got;
}

/* The next step of the splitter: text, or a message's begin or end. */
static enum got mbox_step(struct source *s, enum bsmtp_mbox_event *event,
    struct bsmtp_slice *out)
{
	enum got got = GOT_DATA;
	size_t used;

	do {
		*event = bsmtp_mbox_next(&s->mbox, s->window + s->start, s->end - s->start, s->eof,
		    &used, out);
		source_use(s, used);
		if (*event == BSMTP_MBOX_NEED)
			got = source_fill(s);
	} while (*event == BSMTP_MBOX_NEED && got == GOT_DATA);
	return got;
}

static enum got begin_in_mbox(struct source *s)
{
	enum bsmtp_mbox_event event;
	struct bsmtp_slice sender;
	enum got got;

	s->message_offset = s->offset;
	got = mbox_step(s, &event, &sender);
	if (got != GOT_DATA)
		return got;
	if (event == BSMTP_MBOX_BAD) {
		input_error(s, EX_DATAERR, "no mbox: it does not begin with a From_ line");
		return GOT_ERROR;
	}
	if (event != BSMTP_MBOX_BEGIN)
		return GOT_END;
	s->has_sender = true;
	memcpy(s->sender, sender.at, sender.len);
	s->sender[sender.len] = '\0';
	return GOT_DATA;
}

static enum got text_in_mbox(struct source *s)
{
	enum bsmtp_mbox_event event;
	struct bsmtp_slice text;
	enum got got = mbox_step(s, &event, &text);

	if (got == GOT_DATA && event != BSMTP_MBOX_TEXT)
		return GOT_END;
	if (got == GOT_DATA)
		s->text = text;
	return got;
}

/* An address as a file has it: a local-part alone is of this host. */
static char *qualified(struct bsmtp_slice address)
{
	char whole[BSMTP_MAILBOX_MAX + 256];
	bool local = address.len > 0 && memchr(address.at, '@', address.len) == NULL;

	snprintf(whole, sizeof whole, "%.*s%s%s", (int)address.len, address.at, local ? "@" : "",
	    local ? host_name() : "");
	return copy_slice(slice_of(whole));
}

static void envelope_add(struct envelope *e, struct bsmtp_slice address,
    struct bsmtp_slice parameters)
{
	char *whole = qualified(address);

	list_add(&e->to, slice_of(whole));
	list_add(&e->to_parameters, parameters);
	free(whole);
	e->weight += address.len + parameters.len + 96;
}

/* The next step of the batch's reader; an error names the line. */
static enum got batch_step(struct source *s, enum bsmtp_batch_event *event,
    struct bsmtp_slice *text, struct bsmtp_slice *parameters)
{
	enum got got = GOT_DATA;
	char why[128];
	size_t used;

	do {
		*event = bsmtp_batch_next(&s->batch, s->window + s->start, s->end - s->start, s->eof,
		    &used, text, parameters);
		source_use(s, used);
		if (*event == BSMTP_BATCH_NEED)
			got = source_fill(s);
	} while (*event == BSMTP_BATCH_NEED && got == GOT_DATA);
	if (got != GOT_DATA || *event != BSMTP_BATCH_BAD)
		return got;
	snprintf(why, sizeof why, "line %llu: %.*s", (unsigned long long)s->batch.line,
	    (int)text->len, text->at);
	input_error(s, EX_DATAERR, why);
	return GOT_ERROR;
}

/* A transaction up to its DATA: the envelope. */
static enum got begin_in_batch(struct source *s)
{
	struct envelope *e = &s->envelope;

	for (;;) {
		enum bsmtp_batch_event event;
		struct bsmtp_slice text, parameters;
		uint64_t at = s->offset;
		enum got got = batch_step(s, &event, &text, &parameters);
		if (got != GOT_DATA)
			return got;
		if (event == BSMTP_BATCH_DONE)
			return GOT_END;
		if (event == BSMTP_BATCH_BODY)
			return GOT_DATA;
		if (event == BSMTP_BATCH_MAIL) {
			envelope_free(e);
			s->message_offset = at;
			e->from = qualified(text);
			e->parameters = copy_slice(parameters);
		} else if (event == BSMTP_BATCH_RCPT) {
			envelope_add(e, text, parameters);
		}
		if (e->weight > ENVELOPE_MAX) {
			input_error(s, EX_DATAERR, "too many recipients for one message");
			return GOT_ERROR;
		}
	}
}

static enum got text_in_batch(struct source *s)
{
	enum bsmtp_batch_event event;
	struct bsmtp_slice text, parameters;
	enum got got = batch_step(s, &event, &text, &parameters);

	if (got == GOT_DATA && event == BSMTP_BATCH_END)
		return GOT_END;
	if (got == GOT_DATA)
		s->text = text;
	return got;
}

/* What sendmail's callers write: an mbox's first line may stand in front. */
static enum got begin_from_caller(struct source *s)
{
	enum got got = begin_message(s);

	while (got == GOT_DATA) {
		struct bsmtp_slice sender;
		ptrdiff_t from = bsmtp_from_line_parse(&sender, s->window + s->start, s->end - s->start);
		if (from > 0)
			source_use(s, (size_t)from);
		if (from != BSMTP_MORE || s->eof)
			break;
		got = source_fill(s);
	}
	s->at_line = true;
	return got;
}

/* Up to a line that is "." alone, and without it. */
static enum got text_to_dot(struct source *s)
{
	enum got got = need_octets(s);
	const char *in = s->window + s->start, *lf;
	size_t len = s->end - s->start, n = 0;

	if (got != GOT_DATA)
		return got;
	if (s->at_line && in[0] == '.') {
		if ((len == 1 || (len == 2 && in[1] == '\r')) && !s->eof) {
			got = source_fill(s);
			return got;     /* what is there now is looked at in the next call */
		}
		n = len > 1 && in[1] == '\r' ? 2 : 1;
		if (len == n || in[n] == '\n')
			return GOT_END;
		n = 1;
	}
	do {
		lf = n < len ? memchr(in + n, '\n', len - n) : NULL;
		n = lf != NULL ? (size_t)(lf - in) + 1 : len;
	} while (n < len && in[n] != '.');
	s->at_line = lf != NULL;
	s->text = slice(in, n);
	source_use(s, n);
	return GOT_DATA;
}

/* What the file is, by its first octets; FORMAT_AUTO where these are too few. */
static enum format detect(const char *in, size_t len, bool last, bool *nothing)
{
	struct bsmtp_batch batch;
	struct bsmtp_slice text, parameters;
	struct bsmtp_field field;
	size_t used;
	ptrdiff_t from = bsmtp_from_line_parse(&text, in, len);
	ptrdiff_t name = bsmtp_field_parse(&field, in, len, last);

	*nothing = false;
	if (from > 0)
		return FORMAT_MBOX;
	if (name > 0 || (name == BSMTP_MORE && memchr(in, ':', len) != NULL))
		return FORMAT_MESSAGE;
	memset(&batch, 0, sizeof batch);
	switch (bsmtp_batch_next(&batch, in, len, last, &used, &text, &parameters)) {
	case BSMTP_BATCH_BAD:
		*nothing = from == BSMTP_BAD && name == BSMTP_BAD;
		return FORMAT_AUTO;
	case BSMTP_BATCH_NEED:
		return FORMAT_AUTO;
	default:
		return FORMAT_BATCH;
	}
}

static enum got begin_detected(struct source *s);

static const struct format_row {
	const char *name;
	/* The file's next message: DATA, or END where there is none. */
	enum got (*begin)(struct source *s);
	/* Puts octets of it in s->text: DATA, or END behind the last. */
	enum got (*text)(struct source *s);
} formats[] = {
	[FORMAT_AUTO] = { "auto", begin_detected, NULL },
	[FORMAT_MESSAGE] = { "message", begin_message, text_of_message },
	[FORMAT_MBOX] = { "mbox", begin_in_mbox, text_in_mbox },
	[FORMAT_MAILDIR] = { "maildir", begin_message, text_of_message },
	[FORMAT_BATCH] = { "batch", begin_in_batch, text_in_batch },
	[FORMAT_RAW] = { "raw", begin_message, text_of_message },
	[FORMAT_SENDMAIL] = { "sendmail", begin_from_caller, text_to_dot },
};

static enum got begin_detected(struct source *s)
{
	enum got got = need_octets(s);
	bool nothing = false;

	while (got == GOT_DATA) {
		s->format = detect(s->window + s->start, s->end - s->start, s->eof, &nothing);
		if (s->format != FORMAT_AUTO)
			return formats[s->format].begin(s);
		if (nothing || s->eof || s->end - s->start == WINDOW_SIZE) {
			input_error(s, EX_DATAERR, "no mail: it begins neither with a header field nor "
			    "with a From_ line or a batch's command (--format message sends it as it is)");
			return GOT_ERROR;
		}
		got = source_fill(s);
	}
	return got;
}

/* Sees to it that s->text holds octets of the message. */
static enum got raw_text(struct source *s)
{
	enum got got = s->failed ? GOT_ERROR : GOT_DATA;

	while (s->text.len == 0 && !s->ended && got == GOT_DATA) {
		got = formats[s->format].text(s);
		s->ended = got == GOT_END;
	}
	s->failed = s->failed || got == GOT_ERROR;
	return s->text.len > 0 ? GOT_DATA : s->ended ? GOT_END : got;
}

/* Copies octets to the head until its blank line; that, and what follows in
 * the same run, may be copied too. */
static enum got fill_head(struct source *s)
{
	while (!s->head_done) {
		enum got got = raw_text(s);
		size_t n;
		if (got == GOT_WAIT || got == GOT_ERROR)
			return got;
		if (got == GOT_END || s->head_len == HEAD_MAX) {
			s->head_done = true;
			s->head_long = got != GOT_END;
			break;
		}
		n = min_size(min_size(s->text.len, HEAD_MAX - s->head_len), 2048);
		memcpy(s->head + s->head_len, s->text.at, n);
		s->head_len += n;
		s->text = slice(s->text.at + n, s->text.len - n);
		while (!s->head_done && s->head_scan < s->head_len) {
			const char *line = s->head + s->head_scan;
			size_t left = s->head_len - s->head_scan;
			const char *lf = memchr(line, '\n', left);
			if (lf == NULL)
				break;
			s->head_done = lf == line || (lf == line + 1 && line[0] == '\r');
			if (!s->head_done)
				s->head_scan += (size_t)(lf - line) + 1;
		}
	}
	return GOT_DATA;
}

/* Begins the next message, its header in the head.  GOT_ERROR: this file is
 * given up, call again for the next; GOT_END: there are no more. */
static enum got source_next(struct source *s)
{
	enum got got;

	for (;;) {
		if (!s->opened && !source_open(s))
			return GOT_END;
		got = GOT_DATA;
		if (!s->in_message) {
			s->has_sender = s->ended = s->head_done = s->head_long = false;
			s->head_len = s->head_given = s->head_scan = 0;
			got = formats[s->format].begin(s);
			s->in_message = got == GOT_DATA;
		}
		if (s->in_message)
			got = fill_head(s);
		if (got == GOT_ERROR || got == GOT_END) {
			s->in_message = false;
			source_close(s);
		}
		if (got != GOT_END)
			return got;
	}
}

/* Octets of the message to be sent now: the head, then the rest. */
static enum got source_text(struct source *s, struct bsmtp_slice *text)
{
	enum got got = GOT_DATA;

	if (s->head_given < s->head_len) {
		*text = slice(s->head + s->head_given, s->head_len - s->head_given);
		return GOT_DATA;
	}
	got = raw_text(s);
	*text = s->text;
	return got;
}

static void source_taken(struct source *s, size_t n)
{
	if (s->head_given < s->head_len)
		s->head_given += n;
	else
		s->text = slice(s->text.at + n, s->text.len - n);
}

/* The message is done with; a single message's file too. */
static void source_done(struct source *s)
{
	s->in_message = false;
	s->text.len = 0;
	envelope_free(&s->envelope);
	if (s->failed || (s->format != FORMAT_MBOX && s->format != FORMAT_BATCH))
		source_close(s);
}

static void source_memory(struct source *s)
{
	s->head = grow(NULL, HEAD_MAX);
	s->window = grow(NULL, WINDOW_SIZE);
}

static void source_free(struct source *s)
{
	source_close(s);
	if (s->dir != NULL)
		closedir(s->dir);
	envelope_free(&s->envelope);
	free(s->head);
	free(s->window);
}

/* ---- what the header says ---- */

struct header {
	char sender[BSMTP_MAILBOX_MAX + 1], id[256];
	bool has_sender, utf8, bad_recipient;
	bool malformed;                 /* a line of it is no field */
	struct list to;
};

/* The first address of a field; false if there is none that is valid. */
static bool first_address(const struct bsmtp_field *f, char *out)
{
	struct bsmtp_slice list = f->body;
	char address[BSMTP_MAILBOX_MAX];
	size_t len;

	if (bsmtp_address_next(&list, address, &len) != 1 ||
	    !bsmtp_mailbox_valid(slice(address, len), true))
		return false;
	memcpy(out, address, len);
	out[len] = '\0';
	return true;
}

static void add_addresses(struct header *h, struct bsmtp_slice list)
{
	char address[BSMTP_MAILBOX_MAX];
	size_t len;
	int found;

	while ((found = bsmtp_address_next(&list, address, &len)) == 1) {
		if (!bsmtp_mailbox_valid(slice(address, len), true)) {
			found = -1;
			break;
		}
		if (!list_has(&h->to, slice(address, len)))
			list_add(&h->to, slice(address, len));
	}
	h->bad_recipient = h->bad_recipient || found < 0;
}

static bool is_recipient_field(const struct bsmtp_field *f, bool resent)
{
	static const char *const names[] = { "To", "Cc", "Bcc", "Resent-To", "Resent-Cc",
		"Resent-Bcc" };

	for (size_t i = resent ? 3 : 0; i < (resent ? 6u : 3u); i++)
		if (bsmtp_field_is(f, names[i]))
			return true;
	return false;
}

/* Takes the Bcc fields out of the head; every other octet stays. */
static void drop_bcc(struct source *s, size_t at)
{
	size_t kept = at;
	struct bsmtp_field f;
	ptrdiff_t n;

	while ((n = bsmtp_field_parse(&f, s->head + at, s->head_len - at, true)) > 0) {
		if (!bsmtp_field_is(&f, "Bcc") && !bsmtp_field_is(&f, "Resent-Bcc")) {
			memmove(s->head + kept, s->head + at, (size_t)n);
			kept += (size_t)n;
		}
		at += (size_t)n;
	}
	memmove(s->head + kept, s->head + at, s->head_len - at);
	s->head_len -= at - kept;
}

/* Where the fields begin: an mbox's first line may have been left in front. */
static size_t first_field(const struct source *s)
{
	size_t i = s->head_len > 0 && s->head[0] == '>';
	const char *lf = s->head_len > i ? memchr(s->head, '\n', s->head_len) : NULL;

	return lf != NULL && s->head_len - i > 5 && memcmp(s->head + i, "From ", 5) == 0 ?
	    (size_t)(lf - s->head) + 1 : 0;
}

/* Return-Path before Sender before From: the first of them that has an address. */
static void find_sender(const struct source *s, struct header *h)
{
	static const char *const senders[] = { "Return-Path", "Sender", "From" };
	size_t best = COUNT(senders), at = first_field(s);
	struct bsmtp_field f;
	ptrdiff_t n;

	while ((n = bsmtp_field_parse(&f, s->head + at, s->head_len - at, true)) > 0) {
		for (size_t i = 0; i < best; i++)
			if (bsmtp_field_is(&f, senders[i]) && first_address(&f, h->sender)) {
				h->has_sender = true;
				best = i;
			}
		if (best > 0 && bsmtp_field_is(&f, "Return-Path") && same(trim(f.body), "<>")) {
			h->has_sender = true;
			h->sender[0] = '\0';
			best = 0;
		}
		at += (size_t)n;
	}
}

/* Recipients, the Resent- set before the first one; then Bcc goes. */
static void find_recipients(struct source *s, struct header *h)
{
	size_t begin = first_field(s), at;
	struct bsmtp_field f;
	bool resent = false;
	ptrdiff_t n;

	for (at = begin; (n = bsmtp_field_parse(&f, s->head + at, s->head_len - at, true)) > 0;
	    at += (size_t)n)
		resent = resent || is_recipient_field(&f, true);
	for (at = begin; (n = bsmtp_field_parse(&f, s->head + at, s->head_len - at, true)) > 0;
	    at += (size_t)n)
		if (is_recipient_field(&f, resent))
			add_addresses(h, f.body);
	drop_bcc(s, begin);
}

/* What is wanted of every header: Message-ID, whether it is UTF-8, its form. */
static void read_header(struct source *s, struct header *h)
{
	size_t at = first_field(s);
	struct bsmtp_field f;
	ptrdiff_t n;

	h->has_sender = h->bad_recipient = false;
	h->id[0] = '\0';
	while ((n = bsmtp_field_parse(&f, s->head + at, s->head_len - at, true)) > 0) {
		if (bsmtp_field_is(&f, "Message-ID")) {
			struct bsmtp_slice id = trim(f.body);
			size_t len = min_size(id.len, sizeof h->id - 1);
			memcpy(h->id, id.at, len);
			h->id[len] = '\0';
		}
		at += (size_t)n;
	}
	h->utf8 = bsmtp_has_8bit(slice(s->head, at)) && bsmtp_utf8_valid(slice(s->head, at));
	h->malformed = at < s->head_len && s->head[at] != '\n' && s->head[at] != '\r';
	if (options.to_headers)
		find_recipients(s, h);
}

/* ==== 10 stores ========================================================== */

/* What a kill or a power failure leaves, and what the next start makes of it.  A
 * message is acknowledged at 6 and at d, and not before.  The journal names each
 * message of a group with a state: `?' when the group is begun, then `+' or `-'.
 * Whoever opens the journal settles each `?' by what is on the disk.
 *
 *	killed			on the disk			the next start
 *
 *	files: Maildir, eml
 *	1 text comes		T in tmp			removes T
 *	2 T is synced		T				removes T
 *	3 `?' is synced		T, `?'				names it N: stored
 *	4 T is renamed N	N, or T if power failed; `?'	T: as 3; else stored
 *	5 N's folder is synced	N; `?' or `+'			stored
 *	6 `+'			N; `?' if power failed, or `+'	stored
 *
 *	one file that is appended to: mbox, batch
 *	a text comes		nothing				nothing
 *	b `?' is synced		nothing; `?'			not stored
 *	c it is appended	a part; `?'			cuts it off: not stored
 *	d the file is synced	all of it; `?' or `+'		stored
 *
 * From 2 until the disk has the `+' a second file stands beside T.  Where it does and T is
 * missing, T was renamed, though a reader may have taken N.  Where both are missing somebody
 * else removed them, and the message is not stored unless N is there.  Without an id a
 * message of the file stores needs no journal: at 3 and 4 its sender has no answer and sends
 * it again.
 *
 * At d the journal knows the digest of each message, and does not trust a size: other
 * programs write to the file too.  Where a state cannot be written the group stays open,
 * nothing of it is undone, and no id is taken until it is settled.
 *
 * A command (--exec) cannot be undone.  Its id is known from when it has ended, and a kill
 * before that runs it again. */

/* One message on its way to the store.  The loop fills it, the committer
 * settles it; at no time do both hold it. */
struct job {                    /* the head of what a worker is given */
	struct job *next;
};

struct digest {
	uint64_t a, b;
};

struct hash {                   /* a digest under way */
	uint64_t v[4], word;
	uint64_t len;
};

enum {
	GROUP_MAX = 1024,       /* messages on their way to the disk, at most */
	HEAD_KEPT = 64          /* octets of each message that the journal has */
};

struct delivery {
	struct job job;
	int error;              /* errno of the first failure, 0 */
	int fd, side;           /* its file; that of its envelope; -1: none */
	char name[160], tmp[200];
	char *spool;            /* text that has no file, and how much */
	size_t spool_len, spool_room;
	uint64_t head_len;      /* octets that we have put before its text */
	uint64_t octets;
	char *from;
	struct list to;         /* whom it is stored for */
	struct list known;      /* who has it already */
	bool begun, utf8;
	bool noted;             /* it stands in the group that was begun last */
	bool numbered;          /* eml: its envelope has a number */
	struct hash sum;        /* appended: of what is spooled */
	off_t end;              /* where it ends, and what the journal knows of it */
	struct digest digest, head_digest;
	char head[2 * HEAD_KEPT + 1];
	char last;              /* the octet that was put last */
	struct bsmtp_quoter quoter;
	struct bsmtp_encoder encoder;
	unsigned hops;          /* Received fields so far */
	size_t matched;         /* octets of the line that are those of "Received:" */
	bool past_header;
	/* whose it is */
	struct session *session;
	uint64_t ticket;
	char *peer, *helo;
	const char *protocol;
	char *transid;          /* NULL: none */
	struct digest id;       /* of it */
	bool claimed;           /* the id is under way as this message */
	bool waits;             /* for an earlier message of its session with this id */
	struct delivery *next_claimed;
	enum bsmtp_answer answer;       /* not STORED: given already, nothing is stored */
};

static struct delivery *next_of(const struct delivery *d)
{
	return (struct delivery *)(void *)d->job.next;
}

/* Whether it is still to be stored. */
static bool is_due(const struct delivery *d)
{
	return d->error == 0 && d->answer == BSMTP_ANSWER_STORED;
}

/* Who has which message: pairs of an id and a recipient, by their digests.  The loop
 * asks, the committer adds. */
struct pair {
	struct digest name;
	int64_t seconds;        /* since the Epoch, when it was stored; 0: the place is free */
};

enum { CLAIMS = 256 };

struct ids {
	pthread_mutex_t lock;
	struct digest key;      /* nobody outside knows it: the table cannot be flooded */
	struct pairs {
		struct pair *at;
		size_t room, count;     /* room: a power of two, or 0 */
	} pairs;
	struct delivery *claims[CLAIMS];        /* messages under way that have an id */
};

/* A message of a group, as the journal has it. */
struct part {
	char state;
	off_t end;              /* appended: where it ends */
	struct digest digest;   /* of all of it; of what we have put before its text */
	struct digest head_digest;
	size_t head_len;
	char head[2 * HEAD_KEPT + 1];   /* its first octets, in hex */
	char tmp[200], name[160];       /* files */
};

struct group {
	struct group *next;
	int64_t seconds;
	off_t size, start;      /* of the file before it; where its first message begins */
	off_t state_at;         /* where in the journal its states stand */
	struct part *parts;
	size_t count, room;
	struct grant {          /* who has part `part` of it */
		struct digest pair;
		int64_t seconds;
		size_t part;
	} *grants;
	size_t grant_count, grant_room;
};

struct journal {
	char path[PATH_MAX];    /* empty: the store has none */
	int fd;                 /* -1: not open */
	off_t end;              /* of the records that were read, or written and settled */
	off_t group_end, state_at;      /* of the group that was begun last */
	off_t compact_at;       /* it is written anew when it is larger than this */
	struct group *open, **open_end;         /* groups that are not settled */
	int told;               /* errno of the failure that was told last */
	bool unsynced;          /* states were written that may not be on the disk yet */
};

struct command {
	pid_t pid;
	struct delivery *delivery;
	int64_t until_us;
};

enum { COMMANDS_MAX = 8, COMMANDS_EACH = 6 };   /* at a time; of them for one session */

struct pool {
	struct command running[COMMANDS_MAX];
	size_t count;
	struct job *queue, **queue_end;
	struct job *failed;             /* to start */
};

/* How far a batch was read, and is whole; and the size of the one that was complained of. */
struct batch_end {
	dev_t dev;
	ino_t ino;
	off_t at, whole, told;
	struct bsmtp_batch reader;
};

struct store {
	const struct store_row *row;
	const char *path;
	int dir, tmp_dir, new_dir;      /* equal where the store has but one; -1: none */
	bool single_syncs;      /* syncfs() has failed once, or cannot be trusted */
	uint64_t sequence;      /* of names made by this process, whose number is */
	pid_t pid;
	uint64_t number;        /* eml: the last one taken */
	size_t spooled;         /* octets of messages held in memory */
	struct ids ids;
	struct journal journal;
	struct list kept;       /* files: temporary names of what is stored, its state not synced */
	struct printout unnoted;        /* a command: who has what, as the journal has it not yet */
	struct batch_end batch_end;
	struct pool pool;
	char host[64];
};

/* What tells the stores apart.  The loop opens it, and begins, fills and ends
 * messages; the committer commits them in groups.  One that has no `commit` has
 * nothing to make durable. */
struct append;

struct store_row {
	const char *name;
	enum { LAYOUT_NONE, LAYOUT_FILES, LAYOUT_APPENDED, LAYOUT_COMMAND } layout;
	int (*open)(struct store *st);
	int (*folders)(struct store *st);       /* files: opens, and makes, its folders */
	int (*begin)(struct store *st, struct delivery *d);
	int (*text)(struct store *st, struct delivery *d, struct bsmtp_slice text);
	int (*end)(struct store *st, struct delivery *d);
	void (*commit)(struct store *st, struct delivery *group);
	int (*prepare)(struct store *st, struct delivery *d);   /* files: before the sync */
	int (*check)(struct store *st, const struct append *a); /* appended: whether it may be */
	void (*grown)(struct store *st, off_t end);     /* appended: it was, to here */
	bool subs;              /* files: it has new, cur and tmp */
	bool envelopes;         /* files: beside each stands one */
	bool dotlock;           /* appended: other programs expect FILE.lock */
	bool from_lines;        /* appended: a From_ line begins a message, and nothing else */
};

/* Writes at that place, and moves it; where the file stands if `at` is NULL. */
static int put_at(int fd, const char *out, size_t len, off_t *at)
{
	while (len > 0) {
		ssize_t n = at != NULL ? pwrite(fd, out, len, *at) : write(fd, out, len);
		if (n < 0 && errno != EINTR)
			return -1;
		if (n > 0) {
			out += n;
			len -= (size_t)n;
			if (at != NULL)
				*at += n;
		}
	}
	return 0;
}

static int write_all(int fd, const char *out, size_t len)
{
	return put_at(fd, out, len, NULL);
}

/* Up to len octets at that place; how many there are, or -1. */
static ssize_t get_at(int fd, char *in, size_t len, off_t at)
{
	size_t got = 0;

	while (got < len) {
		ssize_t n = pread(fd, in + got, len - got, at + (off_t)got);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (n == 0)
			break;
		got += (size_t)n;
	}
	return (ssize_t)got;
}

static off_t min_off(off_t a, off_t b)
{
	return a < b ? a : b;
}

static int open_dir(const char *path, bool make)
{
	if (make && mkdir(path, 0700) != 0 && errno != EEXIST)
		return -1;
	return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* What is new is durable only with the folder that names it. */
static int sync_parent(const char *path)
{
	const char *slash = strrchr(path, '/');
	char dir[PATH_MAX];
	int fd, done;

	snprintf(dir, sizeof dir, "%.*s", slash != NULL ? (int)(slash - path + 1) : 1,
	    slash != NULL ? path : ".");
	fd = open_dir(dir, false);
	done = fd < 0 ? -1 : fsync(fd);
	if (fd >= 0)
		close(fd);
	return done;
}

/* Whether the path still names the open file; *here is what that is. */
static bool still_named(int fd, const char *path, struct stat *here)
{
	struct stat there;

	return fstat(fd, here) == 0 && stat(path, &there) == 0 && here->st_dev == there.st_dev &&
	    here->st_ino == there.st_ino;
}

/* ---- digests: SipHash-1-3 of 128 bits (Aumasson and Bernstein, 2012) ---- */

static uint64_t rotate(uint64_t x, unsigned n)
{
	return x << n | x >> (64 - n);
}

static void hash_round(struct hash *h)
{
	uint64_t *v = h->v;

	v[0] += v[1];
	v[1] = rotate(v[1], 13) ^ v[0];
	v[0] = rotate(v[0], 32);
	v[2] += v[3];
	v[3] = rotate(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = rotate(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = rotate(v[1], 17) ^ v[2];
	v[2] = rotate(v[2], 32);
}

static void hash_begin(struct hash *h, struct digest key)
{
	*h = (struct hash){ { key.a ^ UINT64_C(0x736f6d6570736575), key.b ^ UINT64_C(0x646f72616e646f6d) ^ 0xee,
	    key.a ^ UINT64_C(0x6c7967656e657261), key.b ^ UINT64_C(0x7465646279746573) }, 0, 0 };
}

static void hash_word(struct hash *h, uint64_t word)
{
	h->v[3] ^= word;
	hash_round(h);
	h->v[0] ^= word;
}

static void hash_octet(struct hash *h, char c)
{
	h->word |= (uint64_t)(unsigned char)c << (8 * (h->len++ % 8));
	if (h->len % 8 > 0)
		return;
	hash_word(h, h->word);
	h->word = 0;
}

/* Eight octets as a number that is the same on every machine. */
static uint64_t hash_load(const char *at)
{
	const unsigned char *p = (const unsigned char *)at;

	return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24 |
	    (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

static void hash_add(struct hash *h, struct bsmtp_slice s)
{
	struct hash local = *h;         /* in registers: octets may be anybody's */
	size_t i = 0;

	while (i < s.len && local.len % 8 > 0)
		hash_octet(&local, s.at[i++]);
	for (; s.len - i >= 8; i += 8, local.len += 8)
		hash_word(&local, hash_load(s.at + i));
	while (i < s.len)
		hash_octet(&local, s.at[i++]);
	*h = local;
}

static uint64_t hash_fold(struct hash *h)
{
	for (int i = 0; i < 3; i++)
		hash_round(h);
	return h->v[0] ^ h->v[1] ^ h->v[2] ^ h->v[3];
}

static struct digest hash_end(struct hash *h)
{
	struct digest d;

	hash_word(h, h->word | h->len << 56);
	h->v[2] ^= 0xee;
	d.a = hash_fold(h);
	h->v[1] ^= 0xdd;
	d.b = hash_fold(h);
	return d;
}

static bool same_digest(struct digest a, struct digest b)
{
	return a.a == b.a && a.b == b.b;
}

/* ---- ids: who has which message; TRANSID of RFC 1845 ---- */

static int ids_open(struct ids *ids)
{
	if (!random_octets(&ids->key, sizeof ids->key))
		return -1;
	pthread_mutex_init(&ids->lock, NULL);
	return 0;
}

static void ids_close(struct ids *ids)
{
	free(ids->pairs.at);
	pthread_mutex_destroy(&ids->lock);
}

/* The name of an id, or of an id and a recipient.  A domain is the same in any case, and
 * so is "Postmaster" alone (RFC 5321 2.4, 4.5.1). */
static struct digest ids_name(const struct ids *ids, struct bsmtp_slice id, struct bsmtp_slice mailbox)
{
	size_t domain = mailbox.len;
	struct hash h;

	while (domain > 0 && mailbox.at[domain - 1] != '@')
		domain--;
	hash_begin(&h, ids->key);
	hash_add(&h, id);
	hash_octet(&h, '\0');
	hash_add(&h, slice(mailbox.at, domain));
	for (size_t i = domain; i < mailbox.len; i++)
		hash_octet(&h, lower(mailbox.at[i]));
	return hash_end(&h);
}

static bool is_forgotten(const struct pair *p, int64_t now)
{
	return p->seconds + (int64_t)(options.remember_ms / 1000) < now;
}

/* Where the pair stands, or the free place that it would take. */
static struct pair *pairs_place(const struct pairs *p, struct digest name)
{
	size_t i = (size_t)name.a & (p->room - 1);

	while (p->at[i].seconds != 0 && !same_digest(p->at[i].name, name))
		i = (i + 1) & (p->room - 1);
	return &p->at[i];
}

/* Drops what is forgotten, and gives room for twice of what is left. */
static void pairs_grow(struct pairs *p)
{
	struct pairs wide = { NULL, 256, 0 };
	int64_t now = (int64_t)time(NULL);

	for (size_t i = 0; i < p->room; i++)
		wide.count += p->at[i].seconds != 0 && !is_forgotten(&p->at[i], now);
	while (wide.room < 4 * (wide.count + 1))
		wide.room *= 2;
	wide.at = grow(NULL, wide.room * sizeof *wide.at);
	memset(wide.at, 0, wide.room * sizeof *wide.at);
	for (size_t i = 0; i < p->room; i++)
		if (p->at[i].seconds != 0 && !is_forgotten(&p->at[i], now))
			*pairs_place(&wide, p->at[i].name) = p->at[i];
	free(p->at);
	*p = wide;
}

static void ids_add(struct ids *ids, struct digest name, int64_t seconds)
{
	struct pair *p;

	pthread_mutex_lock(&ids->lock);
	if (ids->pairs.count >= ids->pairs.room / 2)
		pairs_grow(&ids->pairs);
	p = pairs_place(&ids->pairs, name);
	ids->pairs.count += p->seconds == 0;
	*p = (struct pair){ name, seconds };
	pthread_mutex_unlock(&ids->lock);
}

/* Whether this recipient has the message of this id. */
static bool ids_has(struct ids *ids, struct bsmtp_slice id, struct bsmtp_slice mailbox)
{
	struct digest name = ids_name(ids, id, mailbox);
	const struct pair *p;
	bool has;

	pthread_mutex_lock(&ids->lock);
	p = ids->pairs.room > 0 ? pairs_place(&ids->pairs, name) : NULL;
	has = p != NULL && p->seconds != 0 && !is_forgotten(p, (int64_t)time(NULL));
	pthread_mutex_unlock(&ids->lock);
	return has;
}

/* All recipients that a message was stored for have it now. */
static void ids_add_all(struct ids *ids, const struct delivery *d, int64_t seconds)
{
	struct bsmtp_slice id = slice_of(d->transid);

	for (size_t i = 0; i < d->to.count; i++)
		ids_add(ids, ids_name(ids, id, slice_of(d->to.items[i])), seconds);
}

/* An id is under way from MAIL to the verdict, as one message: another session's with
 * the same id is put off, and the next of the same session waits its turn. */
static void ids_claim(struct ids *ids, struct delivery *d)
{
	struct delivery **at = &ids->claims[d->id.a % CLAIMS], *other = *at;

	while (other != NULL && !same_digest(other->id, d->id))
		other = other->next_claimed;
	d->waits = other != NULL && other->session == d->session;
	if (other != NULL) {
		d->answer = d->waits ? BSMTP_ANSWER_STORED : BSMTP_ANSWER_UNDER_WAY;
		return;
	}
	d->claimed = true;
	d->next_claimed = *at;
	*at = d;
}

static void ids_release(struct ids *ids, struct delivery *d)
{
	struct delivery **at = &ids->claims[d->id.a % CLAIMS];

	if (!d->claimed)
		return;
	while (*at != d)
		at = &(*at)->next_claimed;
	*at = d->next_claimed;
	d->claimed = false;
}

/* ---- the journal: one record a group ---- */

/* Lines that end in LF:
 *
 *	bsmtp journal 1
 *	group TIME SIZE START	a group; the file has SIZE octets, its first message
 *				begins at START
 *	???			a state for each message: `?', then `+' or `-'
 *	part END DIGEST HEAD LEN DIGEST
 *				appended: where it ends, its digest, its first octets,
 *				how many we put before its text, and their digest
 *	file TMP NAME		files: the name that it has, and that it gets
 *	for ID RECIPIENT	of the part before: who has it when it is there
 *	known TIME ID RECIPIENT	as of a group that is long done
 *	sum DIGEST		ends a record: of its lines but the states
 *
 * States are written over in place, so that this needs no room on the disk.  Every
 * listener at the store holds the lock from `?' to the last state: a `?' that is read
 * is of one that was killed, or could not write.  What is behind the last sum is torn. */

static const char journal_magic[] = "bsmtp journal 1\n";

enum { JOURNAL_SLACK = 1 << 20, JOURNAL_RECORD = 1 << 20 };

static void group_free(struct group *g)
{
	if (g == NULL)
		return;
	free(g->parts);
	free(g->grants);
	free(g);
}

static struct group *group_new(void)
{
	struct group *g = grow(NULL, sizeof *g);

	memset(g, 0, sizeof *g);
	return g;
}

static struct part *group_add(struct group *g)
{
	if (g->count == g->room) {
		g->room = g->room * 2 + 4;
		g->parts = grow(g->parts, g->room * sizeof *g->parts);
	}
	memset(&g->parts[g->count], 0, sizeof *g->parts);
	return &g->parts[g->count++];
}

static void group_grant(struct group *g, struct digest pair, int64_t seconds)
{
	if (g->grant_count == g->grant_room) {
		g->grant_room = g->grant_room * 2 + 4;
		g->grants = grow(g->grants, g->grant_room * sizeof *g->grants);
	}
	g->grants[g->grant_count++] = (struct grant){ pair, seconds, g->count - 1 };
}

/* What is settled of a group is known from now on. */
static void group_learn(struct ids *ids, const struct group *g)
{
	for (size_t i = 0; i < g->grant_count; i++)
		if (g->parts[g->grants[i].part].state == '+')
			ids_add(ids, g->grants[i].pair, g->grants[i].seconds);
}

static void print_digest(struct printout *t, struct digest d)
{
	printout_add(t, " %016llx%016llx", (unsigned long long)d.a, (unsigned long long)d.b);
}

static bool parse_digest(const char *text, struct digest *d)
{
	unsigned long long a, b;

	if (strlen(text) != 32 || sscanf(text, "%16llx%16llx", &a, &b) != 2)
		return false;
	*d = (struct digest){ a, b };
	return true;
}

/* Gives each line of [at, end) to `each`, without its LF, and where it stands; until that
 * returns false, or what is left is no line.  Of one that is longer than any of ours it
 * gives the beginning. */
typedef bool line_fn(void *context, char *line, size_t len, off_t at);

static int journal_lines(int fd, off_t at, off_t end, line_fn *each, void *context)
{
	char text[(32 << 10) + 1];
	bool passing = false;           /* the end of a line that is too long */
	size_t len = 0;

	for (;;) {
		off_t left = end - at - (off_t)len;
		size_t room = sizeof text - 1 - len, want = left < (off_t)room ? (size_t)left : room;
		ssize_t n = get_at(fd, text + len, want, at + (off_t)len);
		char *line = text, *lf;
		if (n < 0)
			return -1;
		len += (size_t)n;
		while ((lf = memchr(line, '\n', len - (size_t)(line - text))) != NULL) {
			*lf = '\0';
			if (!passing && !each(context, line, (size_t)(lf - line), at + (line - text)))
				return 0;
			passing = false;
			line = lf + 1;
		}
		if (line == text && n == 0)
			return 0;               /* no LF any more */
		if (line == text && len == sizeof text - 1) {
			text[len] = '\0';
			if (!passing && !each(context, line, len, at))
				return 0;
			passing = true;
			line = text + len;
		}
		at += line - text;
		len -= (size_t)(line - text);
		memmove(text, line, len);
	}
}

/* A journal that is read: the record under way, and where the last whole one ended. */
struct reading {
	struct store *st;
	struct group *group;
	struct hash sum;
	bool states_next, empty;        /* of the record: its states follow; it has no line */
	bool open;                      /* a state of it is `?' */
	bool damaged;                   /* it is passed over, to its sum */
	char states[GROUP_MAX + 1];
	off_t from, good;               /* where it begins */
	off_t lost;                     /* octets of those that were damaged */
};

static void reading_reset(struct reading *r)
{
	group_free(r->group);
	r->group = group_new();
	hash_begin(&r->sum, (struct digest){ 0, 0 });
	r->states_next = r->open = r->damaged = false;
	r->states[0] = '\0';
	r->empty = true;
}

/* It ends at or after `from`, where it begins. */
static bool read_part(struct part *p, const char *line, off_t from)
{
	char digest[33], head_digest[33];
	long long end;

	if (sscanf(line, "part %lld %32s %128s %zu %32s", &end, digest, p->head, &p->head_len, head_digest) != 5)
		return false;
	p->end = (off_t)end;
	return p->end >= from && parse_digest(digest, &p->digest) && parse_digest(head_digest, &p->head_digest);
}

static bool read_file(struct part *p, const char *line)
{
	return sscanf(line, "file %199s %159s", p->tmp, p->name) == 2 && strchr(p->tmp, '/') == NULL &&
	    strchr(p->name, '/') == NULL;
}

/* A message of the group; more than its state is asked of one that is open. */
static bool read_message(struct reading *r, const char *line)
{
	size_t n = r->group->count;
	char state = r->states[n];
	struct part *p = state != '\0' ? group_add(r->group) : NULL;
	off_t from = n > 0 ? r->group->parts[n - 1].end : r->group->start;

	if (p == NULL)
		return false;
	p->state = state;
	return !r->open || (*line == 'p' ? read_part(p, line, from) : read_file(p, line));
}

/* "ID RECIPIENT": the recipient is the rest of the line, for it may hold spaces. */
static bool read_grant(struct reading *r, const char *text, int64_t seconds)
{
	const char *space = strchr(text, ' ');

	if (space == NULL || r->group->count == 0)
		return false;
	group_grant(r->group, ids_name(&r->st->ids, slice(text, (size_t)(space - text)), slice_of(space + 1)),
	    seconds);
	return true;
}

static bool read_known(struct reading *r, const char *line)
{
	long long seconds;
	int used = 0;

	if (sscanf(line, "known %lld %n", &seconds, &used) != 1 || used == 0)
		return false;
	if (r->empty)
		group_add(r->group)->state = '+';
	return read_grant(r, line + used, (int64_t)seconds);
}

/* The states of a group, which no sum covers: they were written over. */
static bool read_states(struct reading *r, const char *line, size_t len, off_t at)
{
	r->states_next = false;
	r->group->state_at = at;
	r->open = strchr(line, '?') != NULL;
	snprintf(r->states, sizeof r->states, "%s", line);
	return len > 0 && len < sizeof r->states && strspn(line, "?+-") == len;
}

static bool read_group(struct reading *r, const char *line)
{
	long long seconds, size, start;

	if (!r->empty || sscanf(line, "group %lld %lld %lld", &seconds, &size, &start) != 3 ||
	    size < 0 || start < size)
		return false;
	r->group->seconds = (int64_t)seconds;
	r->group->size = (off_t)size;
	r->group->start = (off_t)start;
	r->states_next = true;
	return true;
}

/* A record is whole: what is settled of it is known, what is not is kept. */
static bool read_sum(struct reading *r, const char *line, off_t end)
{
	struct journal *j = &r->st->journal;
	struct group *g = r->group;
	struct digest sum;

	if (!parse_digest(line + 4, &sum) || !same_digest(sum, hash_end(&r->sum)) ||
	    (g->state_at > 0 && g->count != strlen(r->states)))
		return false;
	r->lost += r->from - r->good;
	r->good = end;
	if (!r->open) {
		group_learn(&r->st->ids, g);
	} else {
		*j->open_end = g;
		j->open_end = &g->next;
		r->group = NULL;
	}
	reading_reset(r);
	return true;
}

/* A line of a record; false where that is damaged. */
static bool read_record(struct reading *r, const char *line, size_t len, off_t at)
{
	bool good;

	if (r->states_next)
		return read_states(r, line, len, at);
	hash_add(&r->sum, slice(line, len));
	hash_octet(&r->sum, '\n');
	if (strncmp(line, "group ", 6) == 0)
		good = read_group(r, line);
	else if (strncmp(line, "part ", 5) == 0 || strncmp(line, "file ", 5) == 0)
		good = read_message(r, line);
	else if (strncmp(line, "for ", 4) == 0)
		good = read_grant(r, line + 4, r->group->seconds);
	else
		good = read_known(r, line);
	r->empty = false;
	return good;
}

/* One that is damaged says nothing, and takes nothing with it that stands behind it. */
static bool read_line(void *context, char *line, size_t len, off_t at)
{
	struct reading *r = context;
	off_t next = at + (off_t)len + 1;

	if (!r->states_next && strncmp(line, "sum ", 4) == 0) {
		if (r->damaged || !read_sum(r, line, next))
			reading_reset(r);
		r->from = next;
	} else if (!r->damaged) {
		r->damaged = !read_record(r, line, len, at);
		r->states_next = r->states_next && !r->damaged;
	}
	return true;
}

/* What others have written since; what is torn is cut off, what is damaged passed over. */
static int journal_read(struct store *st, off_t size)
{
	struct journal *j = &st->journal;
	struct reading r = { .st = st, .group = NULL, .from = j->end, .good = j->end };
	int done;

	reading_reset(&r);
	done = journal_lines(j->fd, j->end, size, read_line, &r);
	group_free(r.group);
	if (done != 0)
		return -1;
	j->end = r.good;
	if (r.lost > 0)
		diag("%s: passed over %lld octets of damaged records", j->path, (long long)r.lost);
	if (j->end == size)
		return 0;
	diag("%s: cut off %lld octets that are no whole record", j->path, (long long)(size - j->end));
	return ftruncate(j->fd, j->end);
}

static void journal_close(struct journal *j)
{
	for (struct group *g = j->open, *next; g != NULL; g = next) {
		next = g->next;
		group_free(g);
	}
	j->open = NULL;
	j->open_end = &j->open;
	if (j->fd >= 0)
		close(j->fd);
	j->fd = -1;
	j->end = 0;
}

/* Whether these octets begin a journal; a power failure may have left NULs in place of a
 * first line that was never synced. */
static bool is_journal_head(const char *head, size_t n)
{
	static const char nuls[sizeof journal_magic];

	return memcmp(head, journal_magic, n) == 0 || memcmp(head, nuls, n) == 0;
}

/* A journal is ours alone: whoever else could write there would tell us what is
 * stored, and through a link we should write where he likes. */
static int journal_check(struct journal *j, const struct stat *s)
{
	char head[sizeof journal_magic];
	ssize_t n = get_at(j->fd, head, sizeof journal_magic - 1, 0);

	if (!S_ISREG(s->st_mode) || s->st_uid != geteuid() || (s->st_mode & 077) != 0 || s->st_nlink > 1) {
		errno = EPERM;
		return -1;
	}
	if (n < 0)
		return -1;
	errno = EINVAL;
	return is_journal_head(head, (size_t)n) ? 0 : -1;
}

/* Begins it, where it is empty or its first line is torn. */
static int journal_head(struct journal *j)
{
	off_t at = 0, head = (off_t)sizeof journal_magic - 1;
	char there[sizeof journal_magic];

	j->end = head;
	if (get_at(j->fd, there, (size_t)head, 0) == head && memcmp(there, journal_magic, (size_t)head) == 0)
		return 0;
	if (put_at(j->fd, journal_magic, (size_t)head, &at) != 0 || fsync(j->fd) != 0 || sync_parent(j->path) != 0)
		return -1;
	j->compact_at = JOURNAL_SLACK;
	return 0;
}

/* Opens it and takes the lock; with `make`, where there is none it is made.  It may have
 * been written anew meanwhile, under its name. */
static int journal_take(struct journal *j, bool make, struct stat *here)
{
	for (;;) {
		if (j->fd < 0)
			j->fd = open(j->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | (make ? O_CREAT : 0), 0600);
		if (j->fd < 0 || await_lock(j->fd, F_WRLCK) != 0)
			return -1;
		if (still_named(j->fd, j->path, here))
			return 0;
		journal_close(j);
	}
}

static int journal_trouble(struct journal *j)
{
	int saved = errno;

	if (saved == EPERM)
		diag("%s: not used: it must be yours, one file, and nobody else's to read", j->path);
	else if (saved == EINVAL)
		diag("%s: this is no journal of bsmtp: move it away", j->path);
	else if (saved == EAGAIN || saved == EACCES)
		diag("%s: another process has it", j->path);
	else if (saved != j->told)
		diag("%s: %s", j->path, strerror(saved));
	j->told = saved;
	journal_close(j);
	errno = saved;
	return -1;
}

/* Locks the journal and reads what is new in it.  The caller settles what is open, and
 * unlocks. */
static int journal_lock(struct store *st, bool make)
{
	struct journal *j = &st->journal;
	struct stat here;
	bool fresh;

	if (journal_take(j, make, &here) != 0)
		return !make && errno == ENOENT ? -1 : journal_trouble(j);
	fresh = j->end == 0 || here.st_size < j->end;
	if (fresh && (journal_check(j, &here) != 0 || journal_head(j) != 0))
		return journal_trouble(j);
	if (here.st_size > j->end && journal_read(st, here.st_size) != 0)
		return journal_trouble(j);
	if (fresh && j->compact_at < 2 * j->end)
		j->compact_at = 2 * j->end + JOURNAL_SLACK;
	j->told = 0;
	return 0;
}

static void journal_unlock(struct journal *j)
{
	int saved = errno;

	if (j->fd >= 0)
		(void)lock_file(j->fd, F_UNLCK);
	errno = saved;
}

/* Of all states that were written, too: that is what each group does for the one before. */
static int journal_sync(struct journal *j)
{
	if (fdatasync(j->fd) != 0)
		return -1;
	j->unsynced = false;
	return 0;
}

enum { JOURNAL_DOUBT = 1 };

/* Puts a record at the end, with its sum, and on the disk: 0; -1 where it is not there; and
 * JOURNAL_DOUBT where it may be.  The states stand behind the first line where there are
 * any, and no sum covers them. */
static int journal_put(struct journal *j, struct printout *t, size_t states)
{
	size_t first = states > 0 ? (size_t)((const char *)memchr(t->at, '\n', t->len) + 1 - t->at) : 0;
	size_t rest = first + (states > 0 ? states + 1 : 0);
	off_t at = j->end;
	struct hash h;
	int error, done;

	hash_begin(&h, (struct digest){ 0, 0 });
	hash_add(&h, slice(t->at, first));
	hash_add(&h, slice(t->at + rest, t->len - rest));
	printout_add(t, "sum");
	print_digest(t, hash_end(&h));
	printout_add(t, "\n");
	if (put_at(j->fd, t->at, t->len, &at) == 0 && journal_sync(j) == 0) {
		j->group_end = at;
		return 0;
	}
	error = errno;
	done = ftruncate(j->fd, j->end) == 0 && fdatasync(j->fd) == 0 ? -1 : JOURNAL_DOUBT;
	errno = error;
	return done;
}

/* ---- the journal, written anew ---- */

/* What is still known, copied from one journal to another. */
struct compacting {
	struct journal fresh;
	struct printout text;   /* of the new record */
	struct hash sum;        /* of the old record under way; and where its text begins */
	size_t mark;
	int64_t now, seconds;   /* of the group under way, and its states */
	char states[GROUP_MAX + 1];
	size_t part;            /* counted from 1 */
	bool states_next, failed;
};

/* Puts the record that was gathered. */
static void compact_put(struct compacting *c)
{
	if (!c->failed && c->text.len > 0) {
		c->failed = journal_put(&c->fresh, &c->text, 0) != 0;
		c->fresh.end = c->fresh.group_end;
	}
	c->text.len = 0;
}

/* The pair that a line has, "ID RECIPIENT", and since when; NULL where it has none, or its
 * message is not stored. */
static const char *compact_pair(struct compacting *c, const char *line, int64_t *since)
{
	long long seconds;
	int used = 0;

	if (strncmp(line, "for ", 4) == 0) {
		*since = c->seconds;
		return c->part > 0 && c->part <= strlen(c->states) && c->states[c->part - 1] == '+' ?
		    line + 4 : NULL;
	}
	if (sscanf(line, "known %lld %n", &seconds, &used) != 1 || used == 0)
		return NULL;
	*since = (int64_t)seconds;
	return line + used;
}

/* The end of an old record: nothing is taken from one that is damaged. */
static bool compact_sum(struct compacting *c, const char *line)
{
	struct digest sum;

	if (!parse_digest(line + 4, &sum) || !same_digest(sum, hash_end(&c->sum)))
		c->text.len = c->mark;
	if (c->text.len > JOURNAL_RECORD)
		compact_put(c);
	c->mark = c->text.len;
	hash_begin(&c->sum, (struct digest){ 0, 0 });
	return !c->failed;
}

static bool compact_line(void *context, char *line, size_t len, off_t at)
{
	struct compacting *c = context;
	struct pair p = { { 0, 0 }, 0 };
	long long seconds;
	const char *pair;

	(void)at;
	if (c->states_next) {
		c->states_next = false;
		snprintf(c->states, sizeof c->states, "%.*s", (int)min_size(len, GROUP_MAX), line);
		return true;
	}
	if (strncmp(line, "sum ", 4) == 0)
		return compact_sum(c, line);
	hash_add(&c->sum, slice(line, len));
	hash_octet(&c->sum, '\n');
	if (sscanf(line, "group %lld", &seconds) == 1) {
		c->seconds = (int64_t)seconds;
		c->part = 0;
		c->states_next = true;
	}
	c->part += strncmp(line, "part ", 5) == 0 || strncmp(line, "file ", 5) == 0;
	pair = compact_pair(c, line, &p.seconds);
	if (pair == NULL || is_forgotten(&p, c->now))
		return true;
	printout_add(&c->text, "known %lld %s\n", (long long)p.seconds, pair);
	return true;
}

/* Writes the journal anew, when most of it is about what is settled or forgotten.  Nothing
 * of it is open.  That it fails harms nothing: it is tried again when it is twice as
 * large. */
static void journal_compact(struct journal *j)
{
	struct compacting *c;

	if (j->end < j->compact_at || j->open != NULL)
		return;
	j->compact_at = 2 * j->end;
	c = grow(NULL, sizeof *c);
	memset(c, 0, sizeof *c);
	c->now = (int64_t)time(NULL);
	hash_begin(&c->sum, (struct digest){ 0, 0 });
	c->fresh.open_end = &c->fresh.open;
	snprintf(c->fresh.path, sizeof c->fresh.path, "%.*s.new", (int)sizeof c->fresh.path - 5, j->path);
	(void)unlink(c->fresh.path);    /* of one that was killed here */
	c->fresh.fd = open(c->fresh.path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	c->failed = c->fresh.fd < 0 || lock_file(c->fresh.fd, F_WRLCK) != 0 || journal_head(&c->fresh) != 0;
	if (!c->failed)
		c->failed = journal_lines(j->fd, (off_t)sizeof journal_magic - 1, j->end, compact_line, c) != 0 ||
		    c->failed;
	compact_put(c);
	if (!c->failed && rename(c->fresh.path, j->path) == 0 && sync_parent(j->path) == 0) {
		close(j->fd);
		j->fd = c->fresh.fd;
		j->end = c->fresh.end;
		j->compact_at = 2 * j->end + JOURNAL_SLACK;
	} else {
		(void)unlink(c->fresh.path);
		journal_close(&c->fresh);
	}
	free(c->text.at);
	free(c);
}

/* ---- the journal: a group ---- */

static void print_grants(struct printout *t, const struct delivery *d)
{
	for (size_t i = 0; d->transid != NULL && i < d->to.count; i++)
		printout_add(t, "for %s %s\n", d->transid, d->to.items[i]);
}

/* Begins a group: prints those that are noted, and syncs.  The caller has marked them. */
static int journal_begin(struct store *st, struct delivery *group, off_t size, off_t start,
    void (*print)(struct printout *t, const struct delivery *d))
{
	struct journal *j = &st->journal;
	struct printout t = { NULL, 0, 0 };
	size_t count = 0;
	int done;

	printout_add(&t, "group %lld %lld %lld\n", (long long)time(NULL), (long long)size, (long long)start);
	j->state_at = j->end + (off_t)t.len;
	for (const struct delivery *d = group; d != NULL; d = next_of(d)) {
		count += d->noted;
		if (d->noted)
			printout_add(&t, "?");
	}
	printout_add(&t, "\n");
	for (const struct delivery *d = group; d != NULL; d = next_of(d)) {
		if (!d->noted)
			continue;
		print(&t, d);
		print_grants(&t, d);
	}
	done = journal_put(j, &t, count);
	free(t.at);
	return done;
}

/* Writes the states of the group that was begun; where one is not stored they are on the
 * disk before anything is undone. */
static int journal_settle(struct journal *j, const struct delivery *group)
{
	char states[GROUP_MAX];
	size_t n = 0;
	off_t at = j->state_at;
	bool all = true;

	for (const struct delivery *d = group; d != NULL && n < sizeof states; d = next_of(d)) {
		if (!d->noted)
			continue;
		states[n++] = d->error == 0 ? '+' : '-';
		all = all && d->error == 0;
	}
	if (n == 0)
		return 0;
	j->unsynced = true;
	if (put_at(j->fd, states, n, &at) != 0 || (!all && journal_sync(j) != 0))
		return -1;
	j->end = j->group_end;
	return 0;
}

/* Ends a group.  What is stored is known from now on.  False where it is not `certain' what
 * is there, or the states cannot be written: nothing of the group may be undone then, for
 * it is read again, and settled by what is there.  No id is taken until that is done. */
static bool journal_end(struct store *st, struct delivery *group, bool certain)
{
	int64_t now = (int64_t)time(NULL);
	bool settled = certain && journal_settle(&st->journal, group) == 0;

	if (!certain)
		journal_close(&st->journal);
	else if (!settled)
		(void)journal_trouble(&st->journal);
	for (struct delivery *d = group; d != NULL; d = next_of(d)) {
		if (!d->noted || d->transid == NULL || d->error != 0)
			continue;
		if (settled)
			ids_add_all(&st->ids, d, now);
		else
			d->error = EAGAIN;
	}
	if (settled)
		journal_compact(&st->journal);
	return settled;
}

/* Another listener may have stored it since its recipients were judged. */
static void journal_judge(struct store *st, struct delivery *d)
{
	size_t known = 0;

	if (d->transid == NULL || !is_due(d))
		return;
	for (size_t i = 0; i < d->to.count; i++)
		known += ids_has(&st->ids, slice_of(d->transid), slice_of(d->to.items[i]));
	if (known == d->to.count)
		d->answer = BSMTP_ANSWER_DUPLICATE;
	else if (known > 0)
		d->error = EAGAIN;
}

/* Writes the states of a group that was found open, as its settler has found them. */
static int journal_write_states(struct journal *j, const struct group *g)
{
	off_t at = g->state_at;

	for (size_t i = 0; i < g->count; i++)
		if (put_at(j->fd, &g->parts[i].state, 1, &at) != 0)
			return -1;
	return journal_sync(j);
}

/* The group is settled. */
static void journal_resolved(struct store *st, struct group *g)
{
	struct journal *j = &st->journal;

	group_learn(&st->ids, g);
	j->open = g->next;
	if (j->open == NULL)
		j->open_end = &j->open;
	group_free(g);
}

/* ---- text: to a file of its own, or to memory until that is too much ---- */

enum { SPOOL_MAX = 64 << 10, SPOOLED_MAX = 8 << 20 };

/* Moves the text from memory to a file without a name, gone with its descriptor. */
static int spill(struct store *st, struct delivery *d)
{
	const char *dir = getenv("TMPDIR");
	char path[PATH_MAX];

	if (d->fd >= 0)
		return 0;
	snprintf(path, sizeof path, "%s/bsmtp-%s", dir != NULL ? dir : "/tmp", d->name);
	d->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (d->fd < 0 || unlink(path) != 0 || write_all(d->fd, d->spool, d->spool_len) != 0)
		return -1;
	st->spooled -= d->spool_room;
	free(d->spool);
	d->spool = NULL;
	d->spool_len = d->spool_room = 0;
	return 0;
}

static int put_in_spool(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	size_t need = d->spool_len + text.len, room = d->spool_room;

	if (d->fd < 0 && need > room && need <= SPOOL_MAX) {
		room = room * 2 > need ? room * 2 : need + 1024;
		d->spool = grow(d->spool, room);
		st->spooled += room - d->spool_room;
		d->spool_room = room;
	}
	if (d->fd < 0 && need <= room && st->spooled <= SPOOLED_MAX) {
		memcpy(d->spool + d->spool_len, text.at, text.len);
		d->spool_len = need;
		return 0;
	}
	return spill(st, d) != 0 ? -1 : write_all(d->fd, text.at, text.len);
}

static int put_text(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	if (text.len == 0)
		return 0;
	d->last = text.at[text.len - 1];
	if (st->row->layout == LAYOUT_APPENDED)
		hash_add(&d->sum, text);
	return st->row->layout == LAYOUT_FILES ? write_all(d->fd, text.at, text.len) :
	    put_in_spool(st, d, text);
}

/* CRLF to LF, through one buffer; the text holds no other CR (or was refused). */
static int put_lines(struct store *st, struct delivery *d, struct bsmtp_slice text,
    int (*put_out)(struct store *, struct delivery *, struct bsmtp_slice))
{
	static char copy[COPY_SIZE];
	size_t n = 0;

	while (text.len > 0) {
		const char *cr = memchr(text.at, '\r', text.len);
		size_t run = min_size(cr != NULL ? (size_t)(cr - text.at) : text.len, sizeof copy - n);
		memcpy(copy + n, text.at, run);
		n += run;
		run += text.at + run == cr;
		text = slice(text.at + run, text.len - run);
		if (n == sizeof copy || text.len == 0) {
			if (put_out(st, d, slice(copy, n)) != 0)
				return -1;
			n = 0;
		}
	}
	return 0;
}

static int put_quoted(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	while (text.len > 0) {
		struct bsmtp_slice out;
		size_t used = bsmtp_quote(&d->quoter, text.at, text.len, &out);
		if (put_text(st, d, out) != 0)
			return -1;
		text = slice(text.at + used, text.len - used);
	}
	return 0;
}

static int text_as_lines(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	return put_lines(st, d, text, put_text);
}

/* Counts the Received fields in the header, wherever the text is cut. */
static void count_hops(struct delivery *d, struct bsmtp_slice text)
{
	static const char field[] = "received:";
	enum { WHOLE = sizeof field - 1, OTHER };

	while (text.len > 0 && !d->past_header) {
		const char *lf = d->matched >= WHOLE ? memchr(text.at, '\n', text.len) : text.at;
		char c = lf != NULL ? *lf : '\0';
		size_t used = lf != NULL ? (size_t)(lf - text.at) + 1 : text.len;
		d->past_header = d->matched == 0 && (c == '\r' || c == '\n');
		if (c == '\n')
			d->matched = 0;
		else if (d->matched < WHOLE)
			d->matched = lower(c) == field[d->matched] ? d->matched + 1 : OTHER;
		d->hops += d->matched == WHOLE && lf == text.at;
		text = slice(text.at + used, text.len - used);
	}
}

static int text_for_command(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	count_hops(d, text);
	return put_lines(st, d, text, put_text);
}

static int text_in_mbox_file(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	return put_lines(st, d, text, put_quoted);
}

static int text_in_batch_file(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	static char copy[COPY_SIZE];

	while (text.len > 0) {
		size_t made, used = bsmtp_encode(&d->encoder, copy, sizeof copy, &made, text.at, text.len);
		if (put_text(st, d, slice(copy, made)) != 0)
			return -1;
		text = slice(text.at + used, text.len - used);
	}
	return 0;
}

/* ---- what stands before the text and behind it ---- */

static const char *const day_names[] = { "Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat" };
static const char *const month_names[] = { "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug",
	"Sep", "Oct", "Nov", "Dec" };

typedef void print_fn(struct printout *t, const struct store *st, const struct delivery *d, const struct tm *now);

static int put_head(struct store *st, struct delivery *d, print_fn *print)
{
	time_t seconds = time(NULL);
	struct printout t = { NULL, 0, 0 };
	struct tm now;
	int done;

	gmtime_r(&seconds, &now);
	print(&t, st, d, &now);
	done = put_text(st, d, slice(t.at, t.len));
	free(t.at);
	return done;
}

/* RFC 5321 4.4: the trace header, its date as in RFC 5322 3.3. */
static void print_received(struct printout *t, const struct store *st, const struct delivery *d,
    const struct tm *now)
{
	printout_add(t, "Received: from %s (%s)\n\tby %s with %s id %s;\n\t"
	    "%s, %d %s %d %02d:%02d:%02d +0000\n", d->helo, d->peer, st->host, d->protocol, d->name,
	    day_names[now->tm_wday], now->tm_mday, month_names[now->tm_mon], now->tm_year + 1900,
	    now->tm_hour, now->tm_min, now->tm_sec);
}

static void print_maildir_head(struct printout *t, const struct store *st, const struct delivery *d,
    const struct tm *now)
{
	printout_add(t, "Return-Path: <%s>\n", d->from);
	for (size_t i = 0; i < d->to.count; i++)
		printout_add(t, "Delivered-To: %s\n", d->to.items[i]);
	print_received(t, st, d, now);
}

static void print_mbox_head(struct printout *t, const struct store *st, const struct delivery *d,
    const struct tm *now)
{
	printout_add(t, "From %s %s %s %2d %02d:%02d:%02d %d\n", *d->from != '\0' ? d->from :
	    "MAILER-DAEMON", day_names[now->tm_wday], month_names[now->tm_mon], now->tm_mday,
	    now->tm_hour, now->tm_min, now->tm_sec, now->tm_year + 1900);
	print_maildir_head(t, st, d, now);
}

/* The commands of a batch that stand before a message. */
static void print_batch_head(struct printout *t, const struct store *st, const struct delivery *d,
    const struct tm *now)
{
	(void)st;
	(void)now;
	printout_add(t, "MAIL FROM:<%s>%s\r\n", d->from, d->utf8 ? " SMTPUTF8" : "");
	for (size_t i = 0; i < d->to.count; i++)
		printout_add(t, "RCPT TO:<%s>\r\n", d->to.items[i]);
	printout_add(t, "DATA\r\n");
}

static int begin_in_mbox_file(struct store *st, struct delivery *d)
{
	return put_head(st, d, print_mbox_head);
}

static int begin_in_batch_file(struct store *st, struct delivery *d)
{
	d->encoder.dots = true;
	return put_head(st, d, print_batch_head);
}

static int begin_for_command(struct store *st, struct delivery *d)
{
	return put_head(st, d, print_received);
}

/* The blank line that a From_ line needs before it. */
static int end_in_mbox_file(struct store *st, struct delivery *d)
{
	struct bsmtp_slice rest;

	bsmtp_quote_end(&d->quoter, &rest);
	return put_text(st, d, rest) != 0 ? -1 : put_text(st, d, slice_of(d->last == '\n' ? "\n" : "\n\n"));
}

static int end_in_batch_file(struct store *st, struct delivery *d)
{
	char rest[8];
	size_t n = bsmtp_encode_end(&d->encoder, rest);

	return put_text(st, d, slice(rest, n)) != 0 ? -1 : put_text(st, d, slice_of(".\r\n"));
}

/* ---- files: Maildir and eml ---- */

enum { SIDE_NAME = 256 };

/* Keeps a folder under the descriptor that it had before, if it had one: the committer
 * may be using that. */
static int keep_dir(int *kept, int fd)
{
	if (fd < 0 || *kept < 0) {
		*kept = fd;
		return fd < 0 ? -1 : 0;
	}
	if (dup2(fd, *kept) < 0 || fcntl(*kept, F_SETFD, FD_CLOEXEC) != 0) {
		close(fd);
		return -1;
	}
	close(fd);
	return 0;
}

/* Opens one of a Maildir's folders, and makes it where there is none. */
static int open_sub(const struct store *st, const char *sub)
{
	char path[PATH_MAX];

	snprintf(path, sizeof path, "%s/%s", st->path, sub);
	return open_dir(path, true);
}

static int open_maildir_store(struct store *st)
{
	int cur;

	if (keep_dir(&st->dir, open_dir(st->path, true)) != 0 || (cur = open_sub(st, "cur")) < 0)
		return -1;
	close(cur);
	if (keep_dir(&st->new_dir, open_sub(st, "new")) != 0 || keep_dir(&st->tmp_dir, open_sub(st, "tmp")) != 0)
		return -1;
	return fsync(st->dir) != 0 ? -1 : sync_parent(st->path);
}

/* Whether a folder is not where it was: it was moved away, or made anew. */
static bool is_elsewhere(const struct store *st, int fd, const char *sub)
{
	char path[PATH_MAX];
	struct stat here;

	snprintf(path, sizeof path, "%s/%s", st->path, sub);
	return !still_named(fd, path, &here);
}

static int open_eml_folder(struct store *st)
{
	return keep_dir(&st->dir, open_dir(st->path, true)) != 0 ? -1 : sync_parent(st->path);
}

/* The highest number in use, so that a second run goes on after the first. */
static int open_eml_store(struct store *st)
{
	struct dirent *entry;
	DIR *dir;

	if (open_eml_folder(st) != 0 || (dir = opendir(st->path)) == NULL)
		return -1;
	st->new_dir = st->tmp_dir = st->dir;
	while ((entry = readdir(dir)) != NULL) {
		uint64_t n;
		ptrdiff_t used = bsmtp_number_parse(&n, entry->d_name, strlen(entry->d_name));
		if (used > 0 && n > st->number)
			st->number = n;
	}
	closedir(dir);
	return 0;
}

/* A new file with this temporary name.  The folder may have been removed and made anew:
 * then it is opened again. */
static int open_tmp(struct store *st, const char *tmp)
{
	enum { HOW = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC };
	int fd = openat(st->tmp_dir, tmp, HOW, 0600);

	if (fd < 0 && errno == ENOENT && st->row->folders(st) == 0)
		fd = openat(st->tmp_dir, tmp, HOW, 0600);
	return fd;
}

static int begin_file(struct store *st, struct delivery *d)
{
	snprintf(d->tmp, sizeof d->tmp, "%s%s", st->row->envelopes ? ".tmp-" : "", d->name);
	d->fd = open_tmp(st, d->tmp);
	return d->fd < 0 ? -1 : 0;
}

static int begin_in_maildir(struct store *st, struct delivery *d)
{
	return begin_file(st, d) != 0 ? -1 : put_head(st, d, print_maildir_head);
}

/* Whether it has its name after all: a file server may have done it and lost the reply
 * (RFC 1813 4.5).  The name is there, and is that of this file. */
static bool has_name(const struct store *st, const char *tmp, const char *name)
{
	int saved = errno;
	struct stat there, here = { .st_ino = 0 };
	bool named = fstatat(st->new_dir, name, &there, 0) == 0;
	bool left = fstatat(st->tmp_dir, tmp, &here, 0) == 0 || errno != ENOENT;

	errno = saved;
	return named && (!left || (here.st_dev == there.st_dev && here.st_ino == there.st_ino));
}

/* What stands beside a temporary file until its message is known to be stored: its
 * envelope, or in a Maildir a second name of it.  As long as it does, a temporary file that
 * is missing was named. */
static const char *side_name(const struct store *st, char *side, size_t size, const char *tmp)
{
	snprintf(side, size, "%s.%s", tmp, st->row->envelopes ? "json" : "kept");
	return side;
}

/* Gives a message its name, at once and whole.  Nobody has a number whose envelope is ours;
 * a message that somebody put there by hand is left alone. */
static int publish(const struct store *st, const char *tmp, const char *name)
{
	if (st->row->envelopes && faccessat(st->new_dir, name, F_OK, 0) == 0) {
		errno = EEXIST;
		return has_name(st, tmp, name) ? 0 : -1;
	}
	return renameat(st->tmp_dir, tmp, st->new_dir, name) == 0 || has_name(st, tmp, name) ? 0 : -1;
}

static void drop_side(const struct store *st, const char *tmp)
{
	char side[SIDE_NAME];

	(void)unlinkat(st->tmp_dir, side_name(st, side, sizeof side, tmp), 0);
}

static void drop_temporary(const struct store *st, const char *tmp)
{
	(void)unlinkat(st->tmp_dir, tmp, 0);
	drop_side(st, tmp);
}

/* What stood beside those that are stored goes when the disk has their states. */
static void drop_kept(struct store *st)
{
	if (st->journal.unsynced)
		return;
	for (size_t i = 0; i < st->kept.count; i++)
		drop_side(st, st->kept.items[i]);
	list_free(&st->kept);
}

static void json_add(struct printout *t, struct bsmtp_slice s)
{
	char room[JSON_ESCAPE];

	printout_add(t, "\"");
	while (s.len > 0) {
		struct bsmtp_slice next = json_next(&s, room);
		printout_add(t, "%.*s", (int)next.len, next.at);
	}
	printout_add(t, "\"");
}

static void print_envelope(struct printout *t, const struct delivery *d)
{
	printout_add(t, "{\"from\":");
	json_add(t, slice_of(d->from));
	printout_add(t, ",\"to\":[");
	for (size_t i = 0; i < d->to.count; i++) {
		printout_add(t, "%s", i > 0 ? "," : "");
		json_add(t, slice_of(d->to.items[i]));
	}
	printout_add(t, "],\"peer\":");
	json_add(t, slice_of(d->peer));
	printout_add(t, ",\"helo\":");
	json_add(t, slice_of(d->helo));
	printout_add(t, ",\"protocol\":\"%s\",\"octets\":%llu}\n", d->protocol,
	    (unsigned long long)d->octets);
}

/* The next number, as the name of a message whose envelope is `side`: several listeners
 * may share the folder, and each has the numbers whose envelope it has named. */
static int take_number(struct store *st, const char *side, char *name, size_t size)
{
	int done;

	do {
		snprintf(name, size, "%06llu.json", (unsigned long long)++st->number);
		done = linkat(st->dir, side, st->dir, name, 0);
	} while (done != 0 && errno == EEXIST && !has_name(st, side, name));
	if (done != 0 && errno != EEXIST)
		return -1;
	snprintf(name, size, "%06llu.eml", (unsigned long long)st->number);
	return 0;
}

/* The name of the envelope of the message of this name. */
static const char *envelope_name(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%.*s.json", (int)strcspn(name, "."), name);
	return out;
}

static int write_envelope(const struct delivery *d)
{
	struct printout t = { NULL, 0, 0 };
	int done;

	print_envelope(&t, d);
	done = write_all(d->side, t.at, t.len);
	free(t.at);
	return done;
}

/* A file system that has no links gets an empty file. */
static int prepare_maildir(struct store *st, struct delivery *d)
{
	char side[SIDE_NAME];

	if (d->transid == NULL ||
	    linkat(st->tmp_dir, d->tmp, st->tmp_dir, side_name(st, side, sizeof side, d->tmp), 0) == 0)
		return 0;
	if (errno == EEXIST)            /* nobody else has this name: has_name() */
		return 0;
	if (errno != EPERM && errno != ENOTSUP && errno != EMLINK && errno != ENOSYS)
		return -1;
	d->side = open_tmp(st, side);
	return d->side < 0 ? -1 : 0;
}

/* The envelope beside the message, there before it and synced with it. */
static int prepare_eml(struct store *st, struct delivery *d)
{
	char side[SIDE_NAME];

	d->side = open_tmp(st, side_name(st, side, sizeof side, d->tmp));
	if (d->side < 0)
		return -1;
	d->numbered = write_envelope(d) == 0 && take_number(st, side, d->name, sizeof d->name) == 0;
	return d->numbered ? 0 : -1;
}

/* Removes a message that is not stored, and its envelope, which may have this name. */
static void discard_file(const struct store *st, const char *tmp, const char *name)
{
	char side[SIDE_NAME], number[SIDE_NAME];

	if (st->row->envelopes && *name != '\0' && has_name(st, side_name(st, side, sizeof side, tmp),
	    envelope_name(number, sizeof number, name)))
		(void)unlinkat(st->dir, number, 0);
	drop_temporary(st, tmp);
}

/* Gives a message that was noted its name.  A reader may have taken it, its envelope and
 * with that its number since it had them: then it gets another. */
static int publish_again(struct store *st, const char *tmp, const char *noted)
{
	char side[SIDE_NAME], name[SIDE_NAME];

	if (!st->row->envelopes || has_name(st, side_name(st, side, sizeof side, tmp), envelope_name(name, sizeof name, noted)) ||
	    take_number(st, side, name, sizeof name) != 0)
		return publish(st, tmp, noted);
	return publish(st, tmp, name);
}

/* Whether it is there: 1, or 0; -1 where nobody can tell. */
static int is_there(int dir, const char *name)
{
	if (faccessat(dir, name, F_OK, 0) == 0)
		return 1;
	return errno == ENOENT ? 0 : -1;
}

/* Whether a message of a group that was left open is stored: '+' or '-', and 0 with errno
 * where nobody can tell.  One that has its temporary name gets its own now; one that has
 * not was named if what stands beside it is there, wherever a reader has put it; and where
 * somebody has removed both, its own name tells. */
static char settled_state(struct store *st, const struct part *p)
{
	char side[SIDE_NAME];
	int there;

	if (p->state != '?')
		return p->state;
	there = is_there(st->tmp_dir, p->tmp);
	if (there > 0)
		return publish_again(st, p->tmp, p->name) == 0 ? '+' : '-';
	if (there == 0)
		there = is_there(st->tmp_dir, side_name(st, side, sizeof side, p->tmp));
	if (there == 0)
		there = is_there(st->new_dir, p->name);
	return there < 0 ? '\0' : there > 0 ? '+' : '-';
}

/* Names are T.MxPyQz.host: whether process y was of this host, and is gone; or a day and
 * a half has passed, as for any Maildir. */
static bool is_stale(const struct store *st, const char *name)
{
	size_t host = strlen(st->host);
	struct stat s;
	int used = 0;
	long pid;

	if (fstatat(st->tmp_dir, name, &s, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(s.st_mode))
		return false;
	if (s.st_mtime + 36 * 3600 < time(NULL))
		return true;
	name += strncmp(name, ".tmp-", 5) == 0 ? 5 : 0;
	if (sscanf(name, "%*d.M%*dP%ldQ%*u.%n", &pid, &used) != 1 || used == 0 || pid <= 0 || pid == (long)st->pid)
		return false;
	name += used;
	if (strncmp(name, st->host, host) != 0)
		return false;
	name += host;
	return (*name == '\0' || strcmp(name, ".json") == 0 || strcmp(name, ".kept") == 0) &&
	    kill((pid_t)pid, 0) != 0 && errno == ESRCH;
}

/* An envelope that was given a number, and its message was not: found by its inode. */
static void discard_number(const struct store *st, DIR *dir, const char *side)
{
	char message[NAME_MAX + 1];
	struct dirent *entry;
	struct stat s, number;

	if (fstatat(st->dir, side, &s, AT_SYMLINK_NOFOLLOW) != 0 || s.st_nlink < 2)
		return;
	rewinddir(dir);
	while ((entry = readdir(dir)) != NULL) {
		size_t n = strcspn(entry->d_name, ".");
		if (n == 0 || strcmp(entry->d_name + n, ".json") != 0 || fstatat(st->dir, entry->d_name, &number, 0) != 0 ||
		    number.st_ino != s.st_ino)
			continue;
		snprintf(message, sizeof message, "%.*s.eml", (int)n, entry->d_name);
		if (faccessat(st->dir, message, F_OK, 0) != 0 && errno == ENOENT)
			(void)unlinkat(st->dir, entry->d_name, 0);
		return;
	}
}

/* Removes what listeners that are gone have left, the journal being settled: nobody was
 * told that it is stored. */
static void sweep_files(const struct store *st)
{
	int fd = openat(st->tmp_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
	struct list stale = { NULL, 0, 0 };
	struct dirent *entry;

	if (dir == NULL && fd >= 0)
		close(fd);
	while (dir != NULL && (entry = readdir(dir)) != NULL)
		if ((st->row->envelopes ? strncmp(entry->d_name, ".tmp-", 5) == 0 : entry->d_name[0] != '.') &&
		    is_stale(st, entry->d_name))
			list_add(&stale, slice_of(entry->d_name));
	for (size_t i = 0; i < stale.count; i++) {
		if (st->row->envelopes && strstr(stale.items[i], ".json") != NULL)
			discard_number(st, dir, stale.items[i]);
		(void)unlinkat(st->tmp_dir, stale.items[i], 0);
	}
	list_free(&stale);
	if (dir != NULL)
		closedir(dir);
}

#ifdef __linux__
/* Whether syncfs() says of this folder's file system that all is on the disk: not all of
 * them ask whoever has the disk (FUSE, CIFS), and before Linux 5.8 it told of no failure. */
static bool has_syncfs(int dir)
{
	static const unsigned long known[] = { 0xEF53 /* ext4 */, 0x58465342 /* xfs */, 0x9123683E /* btrfs */,
		0xF2F52010 /* f2fs */, 0x01021994 /* tmpfs */ };
	unsigned major = 0, minor = 0;
	struct utsname system;
	struct statfs s;

	if (uname(&system) != 0 || sscanf(system.release, "%u.%u", &major, &minor) != 2 ||
	    major * 1000 + minor < 5008 || fstatfs(dir, &s) != 0)
		return false;
	for (size_t i = 0; i < COUNT(known); i++)
		if ((unsigned long)s.f_type == known[i])
			return true;
	return false;
}
#endif

/* The data of a whole group with one call, where the system has it.  A failure
 * may have been that of a file whose turn comes later, and is told but once: from
 * then on each file is asked for its own. */
static bool sync_at_once(struct store *st)
{
#ifdef __linux__
	if (!st->single_syncs)
		st->single_syncs = !has_syncfs(st->tmp_dir) || syncfs(st->tmp_dir) != 0;
	return !st->single_syncs;
#else
	(void)st;
	return false;
#endif
}

static void close_files(struct delivery *d)
{
	if (d->fd >= 0 && close(d->fd) != 0 && d->error == 0)
		d->error = errno;
	if (d->side >= 0 && close(d->side) != 0 && d->error == 0)
		d->error = errno;
	d->fd = d->side = -1;
}

/* Settles a group that another listener has left open. */
static int settle_files(struct store *st, struct group *g)
{
	for (size_t i = 0; i < g->count; i++)
		if ((g->parts[i].state = settled_state(st, &g->parts[i])) == '\0')
			return -1;
	if (fsync(st->new_dir) != 0 || journal_write_states(&st->journal, g) != 0)
		return -1;
	for (size_t i = 0; i < g->count; i++)
		if (g->parts[i].state == '-')
			discard_file(st, g->parts[i].tmp, g->parts[i].name);
		else
			drop_temporary(st, g->parts[i].tmp);
	journal_resolved(st, g);
	return 0;
}

static int settle_open_files(struct store *st)
{
	while (st->journal.open != NULL)
		if (settle_files(st, st->journal.open) != 0)
			return journal_trouble(&st->journal);
	return 0;
}

static void print_file(struct printout *t, const struct delivery *d)
{
	printout_add(t, "file %s %s\n", d->tmp, d->name);
}

/* Begins a group in the journal, of the messages that have an id.  Where that cannot be
 * done none of them is stored; and false where they may be in the journal all the same:
 * then they may not be removed. */
static bool note_files(struct store *st, struct delivery *group)
{
	size_t count = 0;
	int done = journal_lock(st, true) != 0 || settle_open_files(st) != 0 ? -1 : 0;

	for (struct delivery *d = group; d != NULL && done == 0; d = next_of(d)) {
		journal_judge(st, d);
		d->noted = d->transid != NULL && is_due(d);
		count += d->noted;
	}
	if (done == 0 && count > 0)
		done = journal_begin(st, group, 0, 0, print_file);
	for (struct delivery *d = group; d != NULL && done != 0; d = next_of(d)) {
		if (d->transid != NULL && is_due(d))
			d->error = errno;
		d->noted = d->noted && done == JOURNAL_DOUBT;
	}
	return done != JOURNAL_DOUBT;
}

/* Gives each its name; false where that is not sure to last. */
static bool name_files(struct store *st, struct delivery *group)
{
	int error;

	for (struct delivery *d = group; d != NULL; d = next_of(d)) {
		close_files(d);
		if (is_due(d) && publish(st, d->tmp, d->name) != 0)
			d->error = errno;
	}
	if (fsync(st->new_dir) == 0)
		return true;
	error = errno;
	for (struct delivery *d = group; d != NULL; d = next_of(d)) {
		if (!is_due(d))
			continue;
		d->error = error;               /* it will be sent again */
		if (!d->noted)
			(void)unlinkat(st->new_dir, d->name, 0);
	}
	return false;
}

static void fail_group(struct delivery *group, int error)
{
	for (struct delivery *d = group; d != NULL; d = next_of(d))
		if (is_due(d))
			d->error = error;
}

/* Syncs the text of each; with `names' also the names that they have by now, before a
 * journal or another name tells of them. */
static void sync_files(struct store *st, struct delivery *group, size_t count, bool names)
{
	enum { FEW = 3 };       /* up to so many, single syncs are the faster way */

	if (count > FEW && sync_at_once(st))
		return;
	for (struct delivery *d = group; d != NULL; d = next_of(d))
		if (d->error == 0 && (fsync(d->fd) != 0 || (d->side >= 0 && fsync(d->side) != 0)))
			d->error = errno;
	if (names && fsync(st->tmp_dir) != 0)
		fail_group(group, errno);
}

static void commit_files(struct store *st, struct delivery *group)
{
	size_t count = 0, ids = 0;
	bool settled = true;

	if (is_elsewhere(st, st->new_dir, st->row->subs ? "new" : ".") ||
	    is_elsewhere(st, st->tmp_dir, st->row->subs ? "tmp" : "."))
		(void)st->row->folders(st);     /* what has its text elsewhere is not stored */
	for (struct delivery *d = group; d != NULL; d = next_of(d), count++) {
		ids += d->transid != NULL;
		if (st->row->prepare != NULL && st->row->prepare(st, d) != 0)
			d->error = errno;
	}
	sync_files(st, group, count, ids > 0 || st->row->envelopes);
	if (ids > 0)
		settled = note_files(st, group);
	drop_kept(st);
	settled = name_files(st, group) && settled;
	if (ids > 0) {
		settled = journal_end(st, group, settled);
		journal_unlock(&st->journal);
	}
	for (struct delivery *d = group; d != NULL; d = next_of(d))
		if (is_due(d) && d->noted)
			list_add(&st->kept, slice_of(d->tmp));
		else if (is_due(d) && st->row->envelopes)
			drop_side(st, d->tmp);
		else if (!is_due(d) && (settled || !d->noted))
			discard_file(st, d->tmp, d->numbered ? d->name : "");
}

/* ---- one file that is appended to: mbox and batch ---- */

struct append {
	int fd;
	off_t size;
	bool dotted;            /* FILE.lock is ours */
};

enum { LEAD_MAX = 300 };

static void lock_name(char *path, size_t size, const struct store *st)
{
	snprintf(path, size, "%s.lock", st->path);
}

enum { STALE_LOCK_SECONDS = 300 };

/* A lock file whose process is gone, or that is old, is in nobody's way: after a power
 * failure another process may have the number. */
static bool dotlock_is_stale(const char *path)
{
	char text[32] = "";
	struct stat s;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	long pid = 0;

	if (fd < 0)
		return false;
	if (fstat(fd, &s) != 0 || get_at(fd, text, sizeof text - 1, 0) < 0) {
		close(fd);
		return false;
	}
	close(fd);
	if (sscanf(text, "%ld", &pid) == 1 && pid > 0 && kill((pid_t)pid, 0) != 0 && errno == ESRCH)
		return true;
	return s.st_mtime + STALE_LOCK_SECONDS < time(NULL);
}

/* A file of this name with our number in it, as liblockfile's has it. */
static int make_lock_file(const char *path)
{
	char text[32];
	int n = snprintf(text, sizeof text, "%ld\n", (long)getpid()), fd, done;

	(void)unlink(path);             /* of one that was killed here */
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	done = fd < 0 ? -1 : write_all(fd, text, (size_t)n);
	return fd >= 0 && close(fd) != 0 ? -1 : done;
}

/* Takes FILE.lock: 0; 1 where another has it.  It has our number from the first moment, so
 * that who kills us leaves nobody waiting: FILE.lock.new is made by who holds the journal's
 * lock.  A file server may have linked it and lost the reply. */
static int take_dotlock(const struct store *st)
{
	char path[PATH_MAX], fresh[PATH_MAX + 8];
	int done, error;
	struct stat s;

	lock_name(path, sizeof path, st);
	snprintf(fresh, sizeof fresh, "%s.new", path);
	done = make_lock_file(fresh);
	if (done == 0 && link(fresh, path) != 0 && (stat(fresh, &s) != 0 || s.st_nlink < 2))
		done = errno == EEXIST ? 1 : -1;
	error = errno;
	if (done == 1 && dotlock_is_stale(path))
		(void)unlink(path);
	(void)unlink(fresh);
	errno = error;
	return done;
}

static void drop_dotlock(const struct store *st, struct append *a)
{
	char path[PATH_MAX];

	lock_name(path, sizeof path, st);
	if (a->dotted)
		(void)unlink(path);
	a->dotted = false;
}

/* Takes both locks that other programs know (Debian Policy 11.6): that of fcntl(2), then
 * the file.  Where the file is another's we let go of the first meanwhile, lest each
 * waits for the other. */
static int append_lock(const struct store *st, struct append *a)
{
	int tries = LOCK_MS / LOCK_STEP_MS, done;

	for (;;) {
		if (await_lock(a->fd, F_WRLCK) != 0)
			return -1;
		done = st->row->dotlock ? take_dotlock(st) : 0;
		a->dotted = done == 0 && st->row->dotlock;
		if (done <= 0)
			return done;
		(void)lock_file(a->fd, F_UNLCK);
		errno = EAGAIN;
		if (tries-- == 0)
			return -1;
		pause_ms(LOCK_STEP_MS);
	}
}

static int append_open_file(const struct store *st, struct append *a)
{
	a->dotted = false;
	a->size = 0;
	a->fd = open(st->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	return a->fd < 0 ? -1 : 0;
}

static void append_close(const struct store *st, struct append *a)
{
	int saved = errno;

	drop_dotlock(st, a);
	if (a->fd >= 0)
		close(a->fd);           /* and with it goes the lock */
	a->fd = -1;
	errno = saved;
}

/* The digest of so many octets of a file: 0; 1 where they are not there. */
static int digest_file(int fd, off_t at, off_t end, struct digest *d)
{
	char copy[16 << 10];
	struct hash h;

	hash_begin(&h, (struct digest){ 0, 0 });
	while (at < end) {
		size_t want = end - at < (off_t)sizeof copy ? (size_t)(end - at) : sizeof copy;
		ssize_t n = get_at(fd, copy, want, at);
		if (n != (ssize_t)want)
			return n < 0 ? -1 : 1;
		hash_add(&h, slice(copy, want));
		at += n;
	}
	*d = hash_end(&h);
	return 0;
}

/* Whether the file has these octets there: 1, or 0; who cannot read it does not know. */
static int has_octets(const struct append *a, off_t at, off_t end, struct digest want)
{
	struct digest got;
	int how = end <= a->size ? digest_file(a->fd, at, end, &got) : 1;

	return how < 0 ? -1 : how == 0 && same_digest(got, want);
}

/* ---- settling an appended group ---- */

/* Whether what it has of a sector is NULs: a power failure has taken a block.  No message
 * begins or ends with NULs. */
static bool has_lost_block(const struct append *a, off_t at, off_t end)
{
	enum { SECTOR = 512 };
	static const char nuls[SECTOR];
	char octets[SECTOR];

	for (off_t next; at < end; at = next) {
		next = min_off(at / SECTOR * SECTOR + SECTOR, end);
		if (get_at(a->fd, octets, (size_t)(next - at), at) == next - at &&
		    memcmp(octets, nuls, (size_t)(next - at)) == 0)
			return true;
	}
	return false;
}

/* Whether what stands in [at, end) is the beginning of the message, but for line ends that
 * another program put after it, and for NULs, which a power failure puts in place of a
 * block. */
static bool begins_alike(const struct append *a, off_t at, off_t end, const struct part *p)
{
	char octets[HEAD_KEPT], hex[2 * HEAD_KEPT + 1];
	size_t most = min_size(strlen(p->head) / 2, sizeof octets), nuls = 0;
	ssize_t got;

	for (int lead = 0; lead < 2 && end > at; lead++, end--)
		if (get_at(a->fd, octets, 1, end - 1) != 1 || octets[0] != '\n')
			break;
	got = get_at(a->fd, octets, (size_t)min_off((off_t)most, end - at), at);
	if (got <= 0)
		return false;
	print_hex(hex, (const unsigned char *)octets, (size_t)got);
	for (size_t i = 0; i < (size_t)got; i++)
		if (octets[i] == '\0')
			nuls++;
		else if (memcmp(hex + 2 * i, p->head + 2 * i, 2) != 0)
			return false;
	return nuls > 0 || end - at < (off_t)p->head_len || has_lost_block(a, at, end) ||
	    has_octets(a, at, at + (off_t)p->head_len, p->head_digest) == 1;
}

/* Whether a From_ line that stands in the middle of a line was put there by another
 * program, which did not look what was before it: ours stand after ">"s that begin the
 * line. */
static bool is_glued(const char *text, const char *from)
{
	while (from > text && from[-1] == '>')
		from--;
	return from > text && from[-1] != '\n';
}

/* Where in [at, end) the next message of another program begins, or the end; -1 where it
 * cannot be read; `glued`: also in the middle of a line. */
static off_t next_from_line(const struct append *a, off_t at, off_t end, bool glued)
{
	enum { STEP = 4096 };
	char text[1 + STEP + BSMTP_FROM_LINE_MAX];
	struct bsmtp_slice sender;

	for (; at < end; at += STEP) {          /* and the octet before */
		ssize_t n = get_at(a->fd, text, sizeof text, at - 1);
		const char *last = text + min_size(n > 0 ? (size_t)n : 0, 1 + STEP), *from = text;
		if (n < 0)
			return -1;
		while (++from < last && (from = memchr(from, 'F', (size_t)(last - from))) != NULL) {
			if (from[-1] != '\n' && !(glued && is_glued(text, from)))
				continue;
			if (bsmtp_from_line_parse(&sender, from, (size_t)(text + n - from)) > 0)
				return min_off(at - 1 + (from - text), end);
		}
	}
	return end;
}

/* The same in a batch: whoever appends to it ends with an end mark, and what is torn has
 * none.  Then nothing tells where the other began: before `at`. */
static off_t next_transaction(const struct append *a, off_t at, off_t end)
{
	enum { STEP = 4096 };
	char text[STEP + 4];

	for (off_t from = at; from < end; from += STEP) {
		ssize_t n = get_at(a->fd, text, sizeof text, from);
		if (n < 0)
			return -1;
		for (ssize_t i = 0; i + 5 <= n; i++)
			if (memcmp(text + i, "\r\n.\r\n", 5) == 0 && from + i + 5 <= end)
				return at - 1;
	}
	return end;
}

static off_t next_foreign(const struct store *st, const struct append *a, off_t at, off_t end, bool glued)
{
	return st->row->from_lines ? next_from_line(a, at, end, glued) : next_transaction(a, at, end);
}

/* Writes over [at, end) what means nothing: blank lines, in a batch after a NOOP where
 * their number is odd. */
static int blank_out(const struct store *st, const struct append *a, off_t at, off_t end)
{
	static const char odd[] = "NOOP xx\r\n";
	char blank[512];

	for (size_t i = 0; i < sizeof blank; i++)
		blank[i] = st->row->from_lines || i % 2 == 1 ? '\n' : '\r';
	if (!st->row->from_lines && (end - at) % 2 == 1 && put_at(a->fd, odd, sizeof odd - 1, &at) != 0)
		return -1;
	while (at < end)
		if (put_at(a->fd, blank, min_size(sizeof blank, (size_t)(end - at)), &at) != 0)
			return -1;
	return 0;
}

static off_t part_start(const struct group *g, size_t i)
{
	return i == 0 ? g->start : g->parts[i - 1].end;
}

/* Where the next message of the group that is whole begins, or the end of the file. */
static off_t next_whole(const struct append *a, const struct group *g, size_t i)
{
	for (i++; i < g->count; i++)
		if (g->parts[i].state == '+')
			return part_start(g, i);
	return a->size;
}

/* How far what is torn of a message reaches; its start where that is not certain: it may be
 * whole, and a mail reader may have marked it.  -1 where it cannot be read. */
static off_t torn_end(const struct store *st, const struct append *a, const struct group *g, size_t i)
{
	const struct part *p = &g->parts[i];
	off_t start = part_start(g, i), limit, end;

	if (start >= a->size)
		return start;
	limit = next_whole(a, g, i);
	end = next_foreign(st, a, start + 1, min_off(limit, p->end - 1), false);
	if (end < 0)
		return -1;
	if (end < min_off(limit, p->end - 1) || limit < p->end)
		end = next_foreign(st, a, start + 1, end, true);
	else if (has_lost_block(a, start, p->end))
		end = p->end;
	else
		return start;
	if (end < 0)
		return -1;
	return end > start && begins_alike(a, start, end, p) ? end : start;
}

/* Takes away what a killed listener left of a message: nobody else's octets are touched. */
static int remove_torn(const struct store *st, struct append *a, const struct group *g, size_t i)
{
	off_t start = part_start(g, i), end = torn_end(st, a, g, i);

	if (end <= start)
		return end < 0 ? -1 : 0;
	if (end < a->size) {
		diag("%s: blanked out %lld octets of a message that was never whole", st->path,
		    (long long)(end - start));
		return blank_out(st, a, start, end);
	}
	start = i == 0 ? g->size : start;
	diag("%s: cut off %lld octets of a message that was never whole", st->path, (long long)(a->size - start));
	a->size = start;
	return ftruncate(a->fd, start);
}

/* What stands before the first message of a group, len octets: blank lines in an mbox, in
 * a batch its opening, with a host as long as it had. */
static void make_lead(const struct store *st, char *lead, size_t len)
{
	memset(lead, st->row->from_lines ? '\n' : 'x', len);
	if (st->row->from_lines)
		return;
	memcpy(lead, "EHLO ", min_size(len, 5));
	if (len == strlen(st->host) + 7)
		memcpy(lead + 5, st->host, strlen(st->host));
	memcpy(lead + len - 2, "\r\n", 2);
}

/* Mends what stands before the first message: it is cut off where it is torn and the last
 * of the file, and a power failure may have left NULs in its place. */
static int mend_lead(const struct store *st, struct append *a, const struct group *g)
{
	char lead[LEAD_MAX], octets[LEAD_MAX];
	size_t len = (size_t)(g->start - g->size);
	off_t at = g->size;
	ssize_t n;

	if (len < (st->row->from_lines ? 1 : 7) || len > sizeof lead || a->size <= g->size)
		return 0;
	make_lead(st, lead, len);
	n = get_at(a->fd, octets, len, at);
	for (ssize_t i = 0; i < min_off(n, 5); i++)
		if (octets[i] != lead[i] && octets[i] != '\0')
			return 0;               /* another program's */
	if (a->size <= g->start) {
		a->size = g->size;
		return ftruncate(a->fd, g->size);
	}
	return n > 0 && memchr(octets, '\0', (size_t)n) != NULL ? put_at(a->fd, lead, len, &at) : 0;
}

/* Settles a group that another listener has left open, by what is in the file. */
static int settle_appended(struct store *st, struct append *a, struct group *g)
{
	for (size_t i = 0; i < g->count; i++) {
		struct part *p = &g->parts[i];
		int there = p->state != '?' ? p->state == '+' : has_octets(a, part_start(g, i), p->end, p->digest);
		if (there < 0)
			return -1;
		p->state = there ? '+' : '-';
	}
	for (size_t i = g->count; i-- > 0;)
		if (g->parts[i].state == '-' && remove_torn(st, a, g, i) != 0)
			return -1;
	if (mend_lead(st, a, g) != 0 || fsync(a->fd) != 0 || journal_write_states(&st->journal, g) != 0)
		return -1;
	journal_resolved(st, g);
	return 0;
}

/* Opens the file under the locks of all, and settles what was left open.  It may have been
 * put aside meanwhile.  That it cannot be opened is found before anything is made. */
static int append_start(struct store *st, struct append *a)
{
	struct stat here;
	int done = append_open_file(st, a);

	if (done == 0)
		done = journal_lock(st, true);
	while (done == 0 && (done = append_lock(st, a)) == 0 && !still_named(a->fd, st->path, &here)) {
		append_close(st, a);
		done = append_open_file(st, a);
	}
	a->size = done == 0 ? here.st_size : 0;
	while (done == 0 && st->journal.open != NULL)
		done = settle_appended(st, a, st->journal.open);
	if (done == 0)
		return 0;
	append_close(st, a);
	journal_unlock(&st->journal);
	return -1;
}

static void append_end(struct store *st, struct append *a)
{
	append_close(st, a);
	journal_unlock(&st->journal);
}

/* Takes from in[0..len) what is whole of a batch: how many octets; *wrong where it is none. */
static size_t batch_end_take(struct batch_end *end, const char *in, size_t len, const char **wrong)
{
	struct bsmtp_slice text, parameters;
	enum bsmtp_batch_event event;
	size_t at = 0, used;

	do {
		event = bsmtp_batch_next(&end->reader, in + at, len - at, false, &used, &text, &parameters);
		at += used;
		if (event == BSMTP_BATCH_BAD)
			*wrong = text.at;
		else if (end->reader.state == BATCH_COMMANDS)
			end->whole = end->at + (off_t)at;
	} while (event != BSMTP_BATCH_NEED && event != BSMTP_BATCH_BAD);
	return at;
}

/* Reads on in a batch to its end: NULL, or what is wrong with it. */
static const char *batch_end_read(struct batch_end *end, const struct append *a)
{
	const char *wrong = NULL;
	char in[16 << 10];
	size_t len = 0;

	while (wrong == NULL && end->at + (off_t)len < a->size) {
		off_t from = end->at + (off_t)len;
		ssize_t n = get_at(a->fd, in + len, (size_t)min_off(a->size - from, (off_t)(sizeof in - len)), from);
		size_t used;
		if (n <= 0)
			return n < 0 ? strerror(errno) : "it has become shorter";
		len += (size_t)n;
		used = batch_end_take(end, in, len, &wrong);
		end->at += (off_t)used;
		len -= used;
		memmove(in, in + used, len);
	}
	if (wrong != NULL)
		return wrong;
	return end->reader.state == BATCH_BODY ? "it ends inside a message" :
	    end->reader.state == BATCH_OPEN ? "it ends inside a transaction" :
	    len > 0 ? "its last line has no end" : NULL;
}

/* Sees to it that what is appended to a batch will be read as it is meant: inside of a
 * message it would be part of that.  What was found whole is not read again. */
static int batch_end_check(struct store *st, const struct append *a)
{
	struct batch_end *end = &st->batch_end;
	const char *wrong;
	struct stat s;

	if (fstat(a->fd, &s) != 0)
		return -1;
	if (end->dev != s.st_dev || end->ino != s.st_ino || a->size < end->at)
		*end = (struct batch_end){ .dev = s.st_dev, .ino = s.st_ino, .told = end->told };
	wrong = batch_end_read(end, a);
	if (wrong == NULL)
		return 0;
	if (end->told != a->size)
		diag("%s: offset %lld: %s: nothing is appended to it: mend it, or move it away", st->path,
		    (long long)end->whole, wrong);
	*end = (struct batch_end){ .told = a->size };   /* it is read anew when it may be mended */
	errno = EBADMSG;
	return -1;
}

/* What we have appended is whole. */
static void batch_end_grow(struct store *st, off_t at)
{
	st->batch_end.at = st->batch_end.whole = at;
	st->batch_end.reader.begun = true;
}

/* At the start a file is mended, and one that cannot be written is known. */
static int open_append_store(struct store *st)
{
	struct append a;
	int done;

	if (append_start(st, &a) != 0)
		return -1;
	done = st->row->check != NULL ? st->row->check(st, &a) : 0;
	append_end(st, &a);
	return done;
}

/* ---- appending a group ---- */

/* What must stand between the file's end and the first message: in an mbox a blank line,
 * in a batch that is empty its opening.  -1 with errno. */
static ssize_t append_lead(struct store *st, const struct append *a, char *lead, size_t size)
{
	char last[2] = { '\n', '\n' };
	size_t n = a->size > 1 ? 2 : (size_t)a->size;

	lead[0] = '\0';
	if (st->row->check != NULL && st->row->check(st, a) != 0)
		return -1;
	if (get_at(a->fd, last + 2 - n, n, a->size - (off_t)n) < 0)
		return -1;
	if (!st->row->from_lines && a->size == 0)
		snprintf(lead, size, "EHLO %s\r\n", st->host);
	if (st->row->from_lines && last[1] != '\n')
		snprintf(lead, size, "\n\n");
	else if (st->row->from_lines && last[0] != '\n')
		snprintf(lead, size, "\n");
	return (ssize_t)strlen(lead);
}

/* What the journal is to know of a message that will begin at `at`; false with errno. */
static bool weigh(struct delivery *d, off_t at)
{
	char octets[HEAD_KEPT];
	ssize_t n = (ssize_t)min_size(d->spool_len, sizeof octets);
	struct hash sum = d->sum;

	if (d->fd < 0)
		memcpy(octets, d->spool, (size_t)n);
	else
		n = get_at(d->fd, octets, sizeof octets, 0);
	if (n < 0)
		return false;
	d->end = at + (off_t)sum.len;
	d->digest = hash_end(&sum);
	print_hex(d->head, (const unsigned char *)octets, (size_t)n);
	return true;
}

static void print_part(struct printout *t, const struct delivery *d)
{
	printout_add(t, "part %lld", (long long)d->end);
	print_digest(t, d->digest);
	printout_add(t, " %s %llu", d->head, (unsigned long long)d->head_len);
	print_digest(t, d->head_digest);
	printout_add(t, "\n");
}

/* What is appended goes to the file in large pieces, wherever a message ends. */
struct gather {
	int fd;
	off_t at;               /* where the file has all before */
	size_t len;
	char octets[COPY_SIZE];
};

static int gather_flush(struct gather *g)
{
	int done = put_at(g->fd, g->octets, g->len, &g->at);

	g->len = 0;
	return done;
}

static int gather_text(struct gather *g, struct bsmtp_slice text)
{
	while (text.len > 0) {
		size_t n = min_size(text.len, sizeof g->octets - g->len);
		memcpy(g->octets + g->len, text.at, n);
		g->len += n;
		text = slice(text.at + n, text.len - n);
		if (g->len == sizeof g->octets && gather_flush(g) != 0)
			return -1;
	}
	return 0;
}

static int gather_message(struct gather *g, const struct delivery *d)
{
	off_t from = 0, size = (off_t)d->sum.len;

	if (d->fd < 0)
		return gather_text(g, slice(d->spool, d->spool_len));
	while (from < size) {
		size_t room = sizeof g->octets - g->len;
		ssize_t n = get_at(d->fd, g->octets + g->len, (size_t)min_off((off_t)room, size - from), from);
		if (n <= 0) {
			errno = n < 0 ? errno : EIO;    /* somebody has cut it off */
			return -1;
		}
		g->len += (size_t)n;
		from += n;
		if (g->len == sizeof g->octets && gather_flush(g) != 0)
			return -1;
	}
	return 0;
}

/* Begins the group in the journal: those that are due, one after the other from `start`. */
static int note_appended(struct store *st, const struct append *a, struct delivery *group, off_t start)
{
	off_t at = start;
	size_t count = 0;
	int done = 0;

	for (struct delivery *d = group; d != NULL; d = next_of(d)) {
		journal_judge(st, d);
		if (is_due(d) && !weigh(d, at))
			d->error = errno;
		d->noted = is_due(d);
		at = d->noted ? d->end : at;
		count += d->noted;
	}
	if (count > 0)
		done = journal_begin(st, group, a->size, start, print_part);
	for (struct delivery *d = group; d != NULL && done != 0; d = next_of(d))
		d->noted = false;
	return done;
}

/* Appends those that are noted, and syncs.  Where the disk is full the messages before
 * that stay. */
static int append_group(struct store *st, struct append *a, struct delivery *group)
{
	static struct gather g;         /* the committer's */
	char lead[LEAD_MAX];
	ssize_t lead_len = append_lead(st, a, lead, sizeof lead);
	off_t good = a->size;
	int done, error;

	if (lead_len < 0 || note_appended(st, a, group, a->size + lead_len) != 0)
		return -1;
	g.fd = a->fd;
	g.at = a->size;
	g.len = 0;
	done = gather_text(&g, slice(lead, (size_t)lead_len));
	for (const struct delivery *d = group; d != NULL && done == 0; d = next_of(d))
		done = d->noted ? gather_message(&g, d) : 0;
	if (done == 0)
		done = gather_flush(&g);
	error = errno;
	for (struct delivery *d = group; d != NULL; d = next_of(d)) {
		if (d->noted && d->end > g.at)
			d->error = error;
		else if (d->noted)
			good = d->end;
	}
	if ((done != 0 || good == a->size) && ftruncate(a->fd, good) != 0)
		return -1;
	if (fsync(a->fd) != 0)
		return -1;
	if (st->row->grown != NULL)
		st->row->grown(st, good);
	return a->size == 0 ? sync_parent(st->path) : 0;
}

static void commit_appended(struct store *st, struct delivery *group)
{
	struct append a;

	if (append_start(st, &a) != 0) {
		fail_group(group, errno);
	} else {
		int done = append_group(st, &a, group), error = errno;
		if (done != 0) {
			(void)!ftruncate(a.fd, a.size);
			fail_group(group, error);
		}
		(void)journal_end(st, group, done == 0);
		append_end(st, &a);
	}
	for (struct delivery *d = group; d != NULL; d = next_of(d))
		close_files(d);
}

/* ---- a command for each message ---- */

/* The text goes to its file here, in the loop, where memory is accounted for.  What has
 * come through so many servers goes in a circle (RFC 5321 6.3). */
static int end_for_command(struct store *st, struct delivery *d)
{
	enum { HOPS_MAX = 100 };

	if (d->hops > HOPS_MAX)
		d->answer = BSMTP_ANSWER_LOOPS;
	return spill(st, d) != 0 || lseek(d->fd, 0, SEEK_SET) != 0 ? -1 : 0;
}

static int open_no_store(struct store *st)
{
	(void)st;
	return 0;
}

static char *variable(const char *name, const char *value)
{
	size_t len = strlen(name) + strlen(value) + 2;
	char *text = grow(NULL, len);

	snprintf(text, len, "%s=%s", name, value);
	return text;
}

/* What a command does not get of our environment: our options, which hold secrets and would
 * be those of a bsmtp that it runs; what was meant for this process alone; what makes the
 * loader or the shell run something else. */
static bool is_ours_alone(const char *entry)
{
	static const char *const names[] = { "BSMTP_", "LD_", "DYLD_", "LISTEN_PID=", "LISTEN_FDS=",
		"LISTEN_FDNAMES=", "NOTIFY_SOCKET=", "SSLKEYLOGFILE=", "ENV=", "BASH_ENV=", "IFS=" };

	for (size_t i = 0; i < COUNT(names); i++)
		if (strncmp(entry, names[i], strlen(names[i])) == 0)
			return true;
	return false;
}

enum { OWN_VARIABLES = 4 };

/* The environment of the command: who the message is from and to, and ours as far as it
 * may have it.  Sendmail's relay is one of us, and is given all. */
static char **command_environment(const struct delivery *d)
{
	extern char **environ;
	size_t n = 0, len = 1, at = OWN_VARIABLES;
	char **all, *to, *end;

	while (environ[n] != NULL)
		n++;
	for (size_t i = 0; i < d->to.count; i++)
		len += strlen(d->to.items[i]) + 1;
	end = to = grow(NULL, len);
	for (size_t i = 0; i < d->to.count; i++)
		end += snprintf(end, len - (size_t)(end - to), "%s%s", i > 0 ? "\n" : "", d->to.items[i]);
	*end = '\0';
	all = grow(NULL, (n + OWN_VARIABLES + 1) * sizeof *all);
	all[0] = variable("BSMTP_SENDER", d->from);
	all[1] = variable("BSMTP_RECIPIENTS", to);
	all[2] = variable("BSMTP_PEER", d->peer);
	all[3] = variable("BSMTP_ID", d->name);
	for (size_t i = 0; i < n; i++)
		if (options.called != NULL || !is_ours_alone(environ[i]))
			all[at++] = environ[i];
	all[at] = NULL;
	free(to);
	return all;
}

/* Its standard input is the message, its output our standard error.  A failure here must
 * not give it another input. */
static int command_files(posix_spawn_file_actions_t *files, int fd)
{
	int error = posix_spawn_file_actions_adddup2(files, fd, STDIN_FILENO);

	return error != 0 ? error : posix_spawn_file_actions_adddup2(files, STDERR_FILENO, STDOUT_FILENO);
}

/* In a process group of its own, so that all of it can be ended; signals as usual. */
static int command_manners(posix_spawnattr_t *how)
{
	sigset_t none, defaults;
	int error;

	sigemptyset(&none);
	sigemptyset(&defaults);
	sigaddset(&defaults, SIGPIPE);
	sigaddset(&defaults, SIGXFSZ);
	error = posix_spawnattr_setsigmask(how, &none);
	if (error == 0)
		error = posix_spawnattr_setsigdefault(how, &defaults);
	if (error == 0)
		error = posix_spawnattr_setpgroup(how, 0);
	return error != 0 ? error : posix_spawnattr_setflags(how,
	    POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
}

/* Runs it with these arguments; 0, or what failed. */
static int spawn_with(pid_t *pid, int fd, char **arguments, char **environment)
{
	posix_spawn_file_actions_t files;
	posix_spawnattr_t how;
	int error = posix_spawn_file_actions_init(&files);

	if (error != 0)
		return error;
	error = posix_spawnattr_init(&how);
	if (error == 0) {
		error = command_files(&files, fd);
		if (error == 0)
			error = command_manners(&how);
		if (error == 0)
			error = posix_spawn(pid, "/bin/sh", &files, &how, arguments, environment);
		posix_spawnattr_destroy(&how);
	}
	posix_spawn_file_actions_destroy(&files);
	return error;
}

/* sh -c CMD, the recipients its arguments. */
static int spawn(pid_t *pid, const char *cmd, const struct delivery *d, char **environment)
{
	char **arguments = grow(NULL, (d->to.count + 5) * sizeof *arguments);
	static char sh[] = "sh", c[] = "-c";
	char *text = copy_slice(slice_of(cmd));
	int error;

	arguments[0] = sh;
	arguments[1] = c;
	arguments[2] = text;
	arguments[3] = options.called != NULL ? options.called : sh;
	for (size_t i = 0; i < d->to.count; i++)
		arguments[4 + i] = d->to.items[i];
	arguments[4 + d->to.count] = NULL;
	error = spawn_with(pid, d->fd, arguments, environment);
	free(text);
	free(arguments);
	return error;
}

/* False where it has failed already. */
static bool command_start(struct store *st, struct delivery *d, struct command *c)
{
	char **environment = command_environment(d);

	c->delivery = d;
	c->until_us = now_us() + (int64_t)options.timeout_ms * 1000;
	d->error = spawn(&c->pid, st->path, d, environment);
	for (int i = 0; i < OWN_VARIABLES; i++)
		free(environment[i]);
	free(environment);
	return d->error == 0;
}

/* What an exit status says of the message (sysexits.h).  What is no verdict of the
 * command's own must not lose it: a shell that cannot go on, as without a process to
 * fork (2); a fault of the system, the program or its configuration; a command that is
 * not found, not to be run, or killed (126 and above). */
static enum bsmtp_answer command_verdict(int status)
{
	static const int undecided[] = { 2, 70, 71, 72, 73, 74, 75, 78 };

	if (status == 0)
		return BSMTP_ANSWER_STORED;
	for (size_t i = 0; i < COUNT(undecided); i++)
		if (status == undecided[i])
			return BSMTP_ANSWER_STORE_FAILED;
	return status < 126 ? BSMTP_ANSWER_NOT_TAKEN : BSMTP_ANSWER_STORE_FAILED;
}

static void command_kill(const struct command *c)
{
	int how;

	(void)kill(-c->pid, SIGKILL);
	while (waitpid(c->pid, &how, 0) < 0 && errno == EINTR)
		;
}

/* Whether it has ended, and how.  What is no verdict of its own is none: killed, too
 * slow, or nobody can tell. */
static bool command_ended(struct command *c)
{
	struct delivery *d = c->delivery;
	int how = 0;
	pid_t pid;

	pid = waitpid(c->pid, &how, WNOHANG);   /* before the clock: we may have been stopped */
	if ((pid == 0 || (pid < 0 && errno == EINTR)) && now_us() <= c->until_us)
		return false;
	if (pid == 0) {
		command_kill(c);
		d->error = ETIMEDOUT;
		return true;
	}
	if (pid < 0)
		d->error = errno;
	else
		d->answer = WIFEXITED(how) ? command_verdict(WEXITSTATUS(how)) : BSMTP_ANSWER_STORE_FAILED;
	return true;
}

/* ---- commands run in a pool: each is reported when it ends ---- */

static void pool_give(struct pool *p, struct delivery *d)
{
	d->job.next = NULL;
	*p->queue_end = &d->job;
	p->queue_end = &d->job.next;
}

static size_t pool_running(const struct pool *p, const struct session *s)
{
	size_t n = 0;

	for (size_t i = 0; i < p->count; i++)
		n += p->running[i].delivery->session == s;
	return n;
}

/* The next message whose command may start: one session never has all the places. */
static struct delivery *pool_next(struct pool *p)
{
	for (struct job **at = &p->queue; p->count < COMMANDS_MAX && *at != NULL; at = &(*at)->next) {
		struct delivery *d = (struct delivery *)(void *)*at;
		if (pool_running(p, d->session) >= COMMANDS_EACH)
			continue;
		*at = d->job.next;
		if (*at == NULL)
			p->queue_end = at;
		return d;
	}
	return NULL;
}

/* Starts what may start. */
static void pool_start(struct store *st)
{
	struct pool *p = &st->pool;
	struct delivery *d;

	while ((d = pool_next(p)) != NULL) {
		if (command_start(st, d, &p->running[p->count])) {
			p->count++;
			continue;
		}
		d->job.next = p->failed;
		p->failed = &d->job;
	}
}

/* Those that have ended, one after the other. */
static struct job *pool_take(struct pool *p)
{
	struct job *done = p->failed;

	p->failed = NULL;
	for (size_t i = 0; i < p->count; i++) {
		if (!command_ended(&p->running[i]))
			continue;
		p->running[i].delivery->job.next = done;
		done = &p->running[i].delivery->job;
		p->running[i--] = p->running[--p->count];
	}
	return done;
}

/* When something is to be taken, at the latest: the first has run for too long then. */
static int64_t pool_alarm(const struct pool *p, int64_t alarm)
{
	if (p->failed != NULL)
		return 0;
	for (size_t i = 0; i < p->count; i++)
		alarm = p->running[i].until_us < alarm ? p->running[i].until_us : alarm;
	return alarm;
}

/* The listener ends at once: nobody waits for a command any more. */
static struct job *pool_stop(struct pool *p)
{
	struct job *done = p->queue;

	p->queue = NULL;
	p->queue_end = &p->queue;
	for (struct job *job = done; job != NULL; job = job->next)
		((struct delivery *)(void *)job)->answer = BSMTP_ANSWER_STOPPING;
	while (p->count > 0) {
		struct command *c = &p->running[--p->count];
		command_kill(c);
		c->delivery->answer = BSMTP_ANSWER_STOPPING;
		c->delivery->job.next = done;
		done = &c->delivery->job;
	}
	return done;
}

/* Puts in the journal what is not there yet.  Where that fails it is tried again, and the
 * lock is kept: another listener would run those commands again. */
static void note_commands(struct store *st)
{
	enum { UNNOTED_MAX = 1 << 20 };
	struct journal *j = &st->journal;
	size_t len = st->unnoted.len;

	if (journal_lock(st, true) != 0)
		return;
	if (journal_put(j, &st->unnoted, 0) == 0) {
		j->end = j->group_end;
		st->unnoted.len = 0;
		j->told = 0;
		journal_compact(j);
		return;
	}
	if (errno != j->told)
		diag("%s: %s", j->path, strerror(errno));
	j->told = errno;
	st->unnoted.len = len;
	if (len > UNNOTED_MAX) {
		diag("%s: too many ids could not be written: the next listener will not know them", j->path);
		st->unnoted.len = 0;
	}
}

/* After the command: the committer notes who has the message now, where ids are kept.  The
 * command has ended, so that a note which cannot be made changes nothing about that. */
static void note_delivered(struct store *st, struct delivery *group)
{
	int64_t now = (int64_t)time(NULL);

	for (const struct delivery *d = group; d != NULL; d = next_of(d)) {
		ids_add_all(&st->ids, d, now);
		for (size_t i = 0; i < d->to.count; i++)
			printout_add(&st->unnoted, "known %lld %s %s\n", (long long)now, d->transid, d->to.items[i]);
	}
	note_commands(st);
	for (struct delivery *d = group; d != NULL; d = next_of(d))
		close_files(d);
}

/* ---- the table ---- */

static const struct store_row store_rows[] = {
	[STORE_MAILDIR] = { .name = "maildir", .layout = LAYOUT_FILES,
		.open = open_maildir_store, .folders = open_maildir_store, .subs = true,
		.begin = begin_in_maildir, .text = text_as_lines,
		.commit = commit_files, .prepare = prepare_maildir },
	[STORE_EML] = { .name = "eml", .layout = LAYOUT_FILES, .envelopes = true,
		.open = open_eml_store, .folders = open_eml_folder,
		.begin = begin_file, .text = put_text,
		.commit = commit_files, .prepare = prepare_eml },
	[STORE_MBOX] = { .name = "mbox", .layout = LAYOUT_APPENDED, .dotlock = true, .from_lines = true,
		.open = open_append_store,
		.begin = begin_in_mbox_file, .text = text_in_mbox_file, .end = end_in_mbox_file,
		.commit = commit_appended },
	[STORE_BATCH] = { .name = "batch", .layout = LAYOUT_APPENDED,
		.open = open_append_store,
		.begin = begin_in_batch_file, .text = text_in_batch_file, .end = end_in_batch_file,
		.check = batch_end_check, .grown = batch_end_grow, .commit = commit_appended },
	[STORE_EXEC] = { .name = "exec", .layout = LAYOUT_COMMAND,
		.open = open_no_store,
		.begin = begin_for_command, .text = text_for_command, .end = end_for_command,
		.commit = note_delivered },
	[STORE_DISCARD] = { .name = "discard", .layout = LAYOUT_NONE, .open = open_no_store },
};

/* Where the store keeps its journal: beside a file, in a folder, or where it was told. */
static void name_journal(struct store *st)
{
	char *path = st->journal.path;
	size_t size = sizeof st->journal.path;

	if (st->row->layout == LAYOUT_FILES)
		snprintf(path, size, "%s/bsmtp.journal", st->path);
	else if (st->row->layout == LAYOUT_APPENDED)
		snprintf(path, size, "%s.journal", st->path);
	else
		snprintf(path, size, "%s", or_empty(options.transids));
}

/* What an earlier run has stored is known, and what it has left open is settled.  With
 * commands the lock is kept: what another listener's command has begun nobody could know. */
static int settle_store(struct store *st)
{
	int done = journal_lock(st, st->row->layout == LAYOUT_COMMAND);

	if (done == 0)
		done = settle_open_files(st);
	else if (errno == ENOENT)
		done = 0;               /* there is none yet */
	if (done == 0 && st->journal.fd >= 0)   /* before what stands beside files goes */
		done = journal_sync(&st->journal);
	if (st->row->layout != LAYOUT_COMMAND)
		journal_unlock(&st->journal);
	if (done == 0 && st->row->layout == LAYOUT_FILES)
		sweep_files(st);
	return done;
}

static int store_open(struct store *st, enum store_kind kind, const char *path)
{
	st->row = &store_rows[kind];
	st->path = path;
	name_journal(st);
	if (ids_open(&st->ids) != 0)
		return -1;
	st->pid = getpid();
	if (gethostname(st->host, sizeof st->host - 1) != 0)
		snprintf(st->host, sizeof st->host, "localhost");
	for (char *p = st->host; *p != '\0'; p++)
		if (!is_alnum(*p) && strchr(".-_", *p) == NULL)
			*p = '_';
	if (st->row->open(st) != 0)
		return -1;
	return st->row->layout == LAYOUT_APPENDED || st->journal.path[0] == '\0' ? 0 : settle_store(st);
}

static void store_init(struct store *st)
{
	st->dir = st->new_dir = st->tmp_dir = st->journal.fd = -1;
	st->journal.open_end = &st->journal.open;
	st->pool.queue_end = &st->pool.queue;
}

static void store_close(struct store *st)
{
	int fds[] = { st->dir, st->tmp_dir != st->dir ? st->tmp_dir : -1,
		st->new_dir != st->dir ? st->new_dir : -1 };

	for (size_t i = 0; i < COUNT(fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	journal_close(&st->journal);
	list_free(&st->kept);
	free(st->unnoted.at);
	ids_close(&st->ids);
}

static void delivery_free(struct store *st, struct delivery *d)
{
	if (d == NULL)
		return;
	close_files(d);
	ids_release(&st->ids, d);
	st->spooled -= d->spool_room;
	free(d->spool);
	free(d->from);
	free(d->peer);
	free(d->helo);
	free(d->transid);
	list_free(&d->to);
	list_free(&d->known);
	free(d);
}

/* The name is of the Maildir convention: time, microseconds, process, count. */
static void delivery_begin(struct store *st, struct delivery *d)
{
	struct timeval t;
	struct hash head;

	d->begun = true;
	if (st->row->begin == NULL)
		return;
	gettimeofday(&t, NULL);
	snprintf(d->name, sizeof d->name, "%lld.M%06ldP%ldQ%llu.%s", (long long)t.tv_sec,
	    (long)t.tv_usec, (long)st->pid, (unsigned long long)++st->sequence, st->host);
	hash_begin(&d->sum, (struct digest){ 0, 0 });    /* it is compared, not looked up */
	if (st->row->begin(st, d) != 0)
		d->error = errno;
	head = d->sum;
	d->head_len = head.len;
	d->head_digest = hash_end(&head);
}

static void delivery_text(struct store *st, struct delivery *d, struct bsmtp_slice text)
{
	if (!d->begun)
		delivery_begin(st, d);
	d->octets += text.len;
	if (st->row->text != NULL && d->error == 0 && st->row->text(st, d, text) != 0)
		d->error = errno;
}

/* The message is whole.  True: it is still to be committed. */
static bool delivery_end(struct store *st, struct delivery *d)
{
	if (!d->begun && is_due(d))     /* a body of no octets */
		delivery_begin(st, d);
	if (st->row->end != NULL && is_due(d) && st->row->end(st, d) != 0)
		d->error = errno;
	if (!is_due(d) && d->tmp[0] != '\0')
		drop_temporary(st, d->tmp);
	return st->row->commit != NULL && is_due(d);
}

static void delivery_forget(struct store *st, struct delivery *d)
{
	if (d != NULL && d->fd >= 0 && d->tmp[0] != '\0')
		drop_temporary(st, d->tmp);
	delivery_free(st, d);
}

/* ---- workers ---- */

/* A thread for what would keep the loop waiting: all that was given while it did the
 * last group is the next one.  The committer's groups are synced together, so their
 * size follows from the disk's speed. */
struct worker {
	void (*run)(void *context, struct job *group);
	void (*rest)(void *context);    /* when nothing has come for a while, and at the end; or NULL */
	void *context;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct job *queue, **queue_end; /* to be done */
	struct job *done, **done_end;
	bool stop, started;
	int signal[2];          /* a pipe: an octet when there is something done */
};

/* Waits for more to do; false where nothing has come for REST_MS. */
static bool worker_wait(struct worker *w, bool rested)
{
	enum { REST_MS = 100 };
	struct timespec until;

	if (rested)
		return pthread_cond_wait(&w->wake, &w->lock) == 0;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += REST_MS * 1000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	return pthread_cond_timedwait(&w->wake, &w->lock, &until) != ETIMEDOUT;
}

static void worker_rest(struct worker *w)
{
	pthread_mutex_unlock(&w->lock);
	w->rest(w->context);
	pthread_mutex_lock(&w->lock);
}

static void *worker_run(void *context)
{
	struct worker *w = context;
	bool rested = true;

	pthread_mutex_lock(&w->lock);
	while (!w->stop || w->queue != NULL) {
		struct job *group = w->queue;
		if (group == NULL) {
			if (!worker_wait(w, rested)) {
				worker_rest(w);
				rested = true;
			}
			continue;
		}
		rested = w->rest == NULL;
		w->queue = NULL;
		w->queue_end = &w->queue;
		pthread_mutex_unlock(&w->lock);
		w->run(w->context, group);
		pthread_mutex_lock(&w->lock);
		*w->done_end = group;
		while (*w->done_end != NULL)
			w->done_end = &(*w->done_end)->next;
		(void)!write(w->signal[1], "", 1);
	}
	if (!rested)
		worker_rest(w);
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

static bool worker_start(struct worker *w, void (*run)(void *, struct job *), void (*rest)(void *),
    void *context)
{
	sigset_t all, old;

	memset(w, 0, sizeof *w);
	w->run = run;
	w->rest = rest;
	w->context = context;
	w->queue_end = &w->queue;
	w->done_end = &w->done;
	if (!make_pipe(w->signal))
		return false;
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->wake, NULL);
	sigfillset(&all);               /* signals are the loop's */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	errno = pthread_create(&w->thread, NULL, worker_run, w);
	w->started = errno == 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return w->started;
}

static void worker_give(struct worker *w, struct job *job)
{
	job->next = NULL;
	pthread_mutex_lock(&w->lock);
	*w->queue_end = job;
	w->queue_end = &job->next;
	pthread_cond_signal(&w->wake);
	pthread_mutex_unlock(&w->lock);
}

static struct job *worker_take(struct worker *w)
{
	struct job *done;
	char octets[64];

	while (read(w->signal[0], octets, sizeof octets) == (ssize_t)sizeof octets)
		;
	pthread_mutex_lock(&w->lock);
	done = w->done;
	w->done = NULL;
	w->done_end = &w->done;
	pthread_mutex_unlock(&w->lock);
	return done;
}

static void worker_stop(struct worker *w)
{
	if (!w->started)
		return;
	pthread_mutex_lock(&w->lock);
	w->stop = true;
	pthread_cond_signal(&w->wake);
	pthread_mutex_unlock(&w->lock);
	pthread_join(w->thread, NULL);
	close(w->signal[0]);
	close(w->signal[1]);
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	w->started = false;
}

/* No group comes that would sync the states of the last one, or what is not noted yet. */
static void commit_rest(void *context)
{
	struct store *st = context;
	struct journal *j = &st->journal;

	if (st->unnoted.len > 0)
		note_commands(st);
	if (j->fd >= 0 && j->unsynced)
		(void)journal_sync(j);
	drop_kept(st);
}

static void commit(void *context, struct job *group)
{
	struct store *st = context;

	st->row->commit(st, (struct delivery *)(void *)group);
}

/* ==== 11 watchers ======================================================== */

/* Octets from elsewhere, made safe for a terminal and a log: what is not
 * printable UTF-8 becomes \xNN. */
static void put_safe(FILE *f, struct bsmtp_slice s)
{
	while (s.len > 0) {
		size_t n = utf8_sequence(s);
		unsigned char c = (unsigned char)s.at[0];
		bool plain = n == 1 ? c >= ' ' && c != 127 : n > 1 && !(c == 0xC2 &&
		    (unsigned char)s.at[1] < 0xA0);
		if (plain)
			fwrite(s.at, 1, n, f);
		else
			fprintf(f, "\\x%02X", c);
		n = plain ? n : 1;
		s = slice(s.at + n, s.len - n);
	}
}

/* The line of --progress is on the terminal, without its end. */
static bool progress_shown;

/* One line on standard error: who, what, why. */
static void diag(const char *format, ...)
{
	char line[2048];
	va_list arguments;
	int n;

	va_start(arguments, format);
	n = vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	fputs(progress_shown ? "\r\033[Kbsmtp: " : "bsmtp: ", stderr);
	progress_shown = false;
	if (n > 0)
		put_safe(stderr, slice(line, min_size((size_t)n, sizeof line - 1)));
	fputc('\n', stderr);
}

/* sysexits in the order of bsmtp(1): the worst first. */
static void worst(int *status, int other)
{
	static const int order[] = { EX_OK, EX_SOFTWARE, EX_OSERR, EX_CANTCREAT, EX_IOERR, EX_UNAVAILABLE,
		EX_TEMPFAIL, EX_PROTOCOL, EX_NOPERM, EX_NOHOST, EX_DATAERR, EX_NOINPUT, EX_USAGE };

	for (size_t i = COUNT(order); i-- > 0;)
		if (*status == order[i] || other == order[i]) {
			*status = order[i];
			return;
		}
}

/* A JSON string; octets that are no UTF-8 become U+FFFD. */
static void json_string(FILE *f, struct bsmtp_slice s)
{
	char room[JSON_ESCAPE];

	fputc('"', f);
	while (s.len > 0) {
		struct bsmtp_slice next = json_next(&s, room);
		fwrite(next.at, 1, next.len, f);
	}
	fputc('"', f);
}

static void json_key(FILE *f, const char *key, struct bsmtp_slice s)
{
	fprintf(f, ",\"%s\":", key);
	json_string(f, s);
}

static void json_text_or_null(FILE *f, const char *key, const char *text)
{
	if (text != NULL)
		json_key(f, key, slice_of(text));
	else
		fprintf(f, ",\"%s\":null", key);
}

static void json_begin(FILE *f, const char *event, int64_t start_us)
{
	fprintf(f, "{\"event\":\"%s\",\"time\":%.3f", event, (double)(now_us() - start_us) / 1e6);
}

static void json_version(FILE *f, const struct link *k)
{
	const char *version = link_version(k);

	if (version == NULL)
		fputs(",\"tls\":null", f);
	else
		fprintf(f, ",\"tls\":\"%s\"", version);
}

/* The transcript, in swaks' notation. */
struct trace {
	int64_t start_us;
	bool server;            /* commands come in, replies go out */
	bool tls;
	char who[96];           /* which session, where there are several */
};

static void trace_mark(const struct trace *t, const char *mark, struct bsmtp_slice line)
{
	if (!options.trace)
		return;
	fprintf(stderr, "%10.3f %s%s ", (double)(now_us() - t->start_us) / 1e3, t->who, mark);
	put_safe(stderr, line);
	fputc('\n', stderr);
}

static void trace_note(const struct trace *t, const char *format, ...) PRINTF_LIKE(2, 3);
static void trace_note(const struct trace *t, const char *format, ...)
{
	char line[1024];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	trace_mark(t, "===", slice_of(line));
}

static void trace_tap(void *context, enum bsmtp_tap_kind kind, struct bsmtp_slice line,
    uint64_t octets)
{
	const struct trace *t = context;
	bool error = line.len > 0 && line.at[0] >= '4' && line.at[0] <= '5';
	char body[64];

	if (kind == BSMTP_TAP_BODY) {
		snprintf(body, sizeof body, "(%llu octets of body)", (unsigned long long)octets);
		line = slice_of(body);
	}
	if ((kind == BSMTP_TAP_REPLY) == t->server)
		trace_mark(t, error && t->server ? " **>" : t->tls ? " ~>" : " ->", line);
	else
		trace_mark(t, error && !t->server ? "<**" : t->tls ? "<~ " : "<- ", line);
}

/* Whether all that was written to standard output got there. */
static bool stdout_good(void)
{
	return fflush(stdout) == 0 && !ferror(stdout);
}

/* ---- progress ---- */

struct progress {
	int64_t start_us, shown_us;
	uint64_t input;                 /* octets of input, where that is known; else 0 */
	uint64_t messages, octets;      /* settled so far, and read */
};

enum { PROGRESS_AFTER_US = 1000000, PROGRESS_EACH_US = 200000 };

static void progress_line(const struct progress *p, int64_t now)
{
	double seconds = (double)(now - p->start_us) / 1e6, rate = (double)p->octets / seconds;
	uint64_t left = p->input > p->octets && rate > 0 ?
	    (uint64_t)((double)(p->input - p->octets) / rate) : 0;

	fprintf(stderr, "\r\033[K%llu messages, %.1f MB, %.1f MB/s", (unsigned long long)p->messages,
	    (double)p->octets / 1e6, rate / 1e6);
	if (left > 0)
		fprintf(stderr, ", %llu:%02u left", (unsigned long long)left / 60, (unsigned)(left % 60));
	(void)fflush(stderr);
	progress_shown = true;
}

/* Now and then; `end`: the last line, which stays where there was one. */
static void progress(struct progress *p, bool end)
{
	int64_t now = now_us();
	bool due = options.progress == PROGRESS_ALWAYS || now - p->start_us > PROGRESS_AFTER_US;

	if (options.progress == PROGRESS_NEVER ||
	    (end ? !due : !due || now - p->shown_us < PROGRESS_EACH_US))
		return;
	p->shown_us = now;
	if (options.progress == PROGRESS_AUTO && !isatty(STDERR_FILENO))
		return;
	progress_line(p, now > p->start_us ? now : now + 1);
	if (!end)
		return;
	fputc('\n', stderr);
	progress_shown = false;
}

/* ==== 12 send ============================================================ */

/* A fate, and the reply that decided it. */
struct verdict {
	enum bsmtp_fate fate;
	enum bsmtp_verb verb;           /* the command that it answered */
	int code;                       /* 0: there was none */
	char *status, *text;            /* NULL where nobody asks */
};

/* A message: begun, and its fate not told yet. */
struct letter {
	struct letter *next;
	uint64_t n, offset, position, octets;
	int64_t start_us, end_us;
	const char *source, *id, *from, *parameters;    /* behind the struct */
	const char *transid;            /* likewise; NULL: none */
	bool identified;                /* it has left, with the message */
	bool international;             /* an address is not ASCII */
	struct list own;                /* recipients of its header, or its envelope */
	struct list own_parameters;     /* beside each, where it is the envelope */
	const struct list *to;          /* these, or those of the command line */
	struct verdict verdict, *verdicts;      /* on it; on each recipient */
	size_t weight;                  /* octets of memory it takes */
};

/* Letters in order. */
struct queue { struct letter *first, **last; };

/* What all letters in flight may take together, and half as much those that are held;
 * with it, memory is bounded. */
enum { FLIGHT_MAX = 1536 << 10 };

/* One connection to the server. */
struct dialogue {
	struct link link;
	pid_t child;                    /* the command of --connect-command, or 0 */
	int64_t dial_us, progress_us, grace_start_us;
	uint64_t transactions;
	bool greeted, grace_waited, turned, half_closed;
	bool agreed;                    /* the opening was reported */
	bool broken;                    /* nothing can be written any more */
	bool cut;                       /* a body has no end, and no way to say so */
	bool gave_up;                   /* the end is ours, not the server's */
	bool miscounted;                /* its replies did not match the commands */
	bool again;                     /* another is to follow it */
};

struct sender {
	struct source operands;         /* all that is named on the command line */
	struct source *detour;          /* a message made a batch of several, or NULL */
	struct source *input;           /* the one that is read now */
	struct bsmtp_client client;
	struct bsmtp_client_config config;
	struct trace trace;
	struct dialogue on;
	struct tls_context *tls;        /* NULL: no TLS is asked for */
	struct progress progress;
	char peer[128];
	struct queue flight;            /* begun, and no fate known */
	struct letter *fresh;           /* it has one now, and the next reply may confirm it */
	struct queue held;              /* that did not, so that it might yet prove wrong */
	struct letter *current;         /* being read: the last in flight, or dropped */
	struct header header;           /* of the message that comes next */
	size_t weight, held_weight, rcpt;
	bool laden;                     /* no letter is begun until half of that is done with */
	uint64_t n, counts[BSMTP_FATES], octets, turnarounds, refused, strays;
	int64_t start_us, connect_us, grace_us;
	uint64_t doubt_first, doubt_last;       /* numbers of the unknown, of this run */
	bool ready;                     /* a message waits to be begun */
	bool dropping;                  /* the current letter was never in flight */
	bool source_waits, source_over;
	bool automatic, remembered;     /* --mode auto, and what it recalls */
	enum bsmtp_mode fallback;       /* BSMTP_MODES: none, or none any more */
	bool hopeless;                  /* what was not sent is refused for good */
	int status;
	char out[OUT_SIZE];
	unsigned char due[DUE_SIZE];
	char in[16 << 10];
	char key[25];                   /* of --transid, in hex */
	char raw[BSMTP_REPLY_LINE_MAX];         /* a line for print_raw() */
	size_t raw_len;
};

static void queue_add(struct queue *q, struct letter *l)
{
	if (q->first == NULL)
		q->last = &q->first;
	l->next = NULL;
	*q->last = l;
	q->last = &l->next;
}

static struct letter *queue_take(struct queue *q)
{
	struct letter *l = q->first;

	q->first = l->next;
	return l;
}

static void verdict_free(struct verdict *v)
{
	free(v->status);
	free(v->text);
	memset(v, 0, sizeof *v);
}

/* Nothing is known of its recipients. */
static void forget_recipients(struct letter *l)
{
	for (size_t i = 0; l->verdicts != NULL && i < l->to->count; i++)
		verdict_free(&l->verdicts[i]);
}

static void letter_free(struct sender *s, struct letter *l)
{
	s->weight -= l->weight;
	verdict_free(&l->verdict);
	forget_recipients(l);
	free(l->verdicts);
	list_free(&l->own);
	list_free(&l->own_parameters);
	free(l);
}

/* The guess at a sender where nothing names one: this user here. */
static const char *this_user(void)
{
	static char guess[600];

	snprintf(guess, sizeof guess, "%.200s@%s", user_name(), host_name());
	return bsmtp_mailbox_valid(slice_of(guess), true) ? guess : "";
}

/* --from, else the envelope or the From_ line where it names an address, else the
 * header. */
static const char *envelope_sender(struct sender *s)
{
	struct bsmtp_slice from = slice_of(s->input->sender);

	if (options.from != NULL && s->detour == NULL)
		return options.from;
	if (s->input->envelope.from != NULL)
		return s->input->envelope.from;
	if (s->input->has_sender && same(from, "MAILER-DAEMON"))
		return "";
	if (s->input->has_sender && bsmtp_mailbox_valid(from, true))
		return s->input->sender;
	find_sender(s->input, &s->header);
	return s->header.has_sender ? s->header.sender : this_user();
}

/* Whether the envelope that came with the message says who it is for. */
static bool has_own_envelope(const struct sender *s)
{
	return s->input->envelope.from != NULL && (s->detour != NULL ||
	    (options.to.count == 0 && !options.to_headers));
}

static void address_letter(struct sender *s, struct letter *l)
{
	struct envelope *e = &s->input->envelope;

	l->to = &l->own;
	if (has_own_envelope(s)) {
		l->own = e->to;
		l->own_parameters = e->to_parameters;
		memset(&e->to, 0, sizeof e->to);
		memset(&e->to_parameters, 0, sizeof e->to_parameters);
		l->weight += e->weight;
		return;
	}
	if (!options.to_headers) {
		l->to = &options.to;
		return;
	}
	for (size_t i = 0; i < options.to.count; i++)
		list_add(&l->own, slice_of(options.to.items[i]));
	for (size_t i = 0; i < s->header.to.count; i++)
		if (!list_has(&options.to, slice_of(s->header.to.items[i])))
			list_add(&l->own, slice_of(s->header.to.items[i]));
	for (size_t i = 0; i < l->own.count; i++)
		l->weight += strlen(l->own.items[i]) + 32;
}

/* Copies a string to *at and moves it behind; returns the copy. */
static const char *pack(char **at, const char *text)
{
	size_t size = strlen(text) + 1;
	char *copy = memcpy(*at, text, size);

	*at += size;
	return copy;
}

/* <number.key@host>: the key is this run's, the number the message's.  Of a name too
 * long the last labels tell the most. */
static void make_transid(const struct sender *s, char *out, size_t size)
{
	enum { HOST = 30 };
	const char *host = s->config.helo;

	while (strlen(host) > HOST && strchr(host, '.') != NULL)
		host = strchr(host, '.') + 1;
	snprintf(out, size, "<%llu.%s@%.*s>", (unsigned long long)s->n + 1, s->key, HOST, host);
	if (!bsmtp_transid_valid(slice_of(out)))        /* an address literal */
		snprintf(out, size, "<%llu.%s@localhost>", (unsigned long long)s->n + 1, s->key);
}

/* What TRANSID the next letter has: its own, or one that is made; true: the latter. */
static bool choose_transid(const struct sender *s, const char *parameters, char *out, size_t size)
{
	struct bsmtp_slice list = slice_of(parameters);
	struct bsmtp_parameter p;
	ptrdiff_t n;

	*out = '\0';
	for (; (n = bsmtp_parameter_parse(&p, list.at, list.len)) > 0;
	    list = slice(list.at + n, list.len - (size_t)n))
		if (same(p.keyword, "TRANSID") && p.value.len < size) {
			snprintf(out, size, "%.*s", (int)p.value.len, p.value.at);
			return false;
		}
	if (options.transid)
		make_transid(s, out, size);
	return options.transid;
}

static bool list_has_8bit(const struct list *list)
{
	size_t i = 0;

	while (i < list->count && !bsmtp_has_8bit(slice_of(list->items[i])))
		i++;
	return i < list->count;
}

static struct letter *letter_new(struct sender *s)
{
	const char *source = s->operands.name, *from = envelope_sender(s);
	const char *given = or_empty(s->input->envelope.from != NULL ?
	    s->input->envelope.parameters : options.parameters);
	char parameters[BSMTP_COMMAND_MAX], transid[BSMTP_TRANSID_MAX + 1];
	bool named = choose_transid(s, given, transid, sizeof transid);
	size_t size = sizeof(struct letter) + strlen(source) + strlen(s->header.id) + strlen(from) +
	    strlen(given) + 2 * sizeof transid + 20;
	struct letter *l = grow(NULL, size);
	char *at = (char *)(l + 1);

	memset(l, 0, sizeof *l);
	l->n = ++s->n;
	l->offset = s->operands.message_offset;
	l->start_us = now_us();
	l->source = pack(&at, source);
	l->id = pack(&at, s->header.id);
	l->from = pack(&at, from);
	snprintf(parameters, sizeof parameters, "%s%s%s", named ? " TRANSID=" : "",
	    named ? transid : "", given);       /* in front, there is always room for it */
	l->parameters = pack(&at, parameters);
	l->transid = *transid != '\0' ? pack(&at, transid) : NULL;
	l->weight = size + 64;
	address_letter(s, l);
	l->weight += (l->to->count + 1) * sizeof *l->verdicts;
	l->international = bsmtp_has_8bit(slice_of(l->from)) || list_has_8bit(l->to);
	list_free(&s->header.to);
	s->weight += l->weight;
	return l;
}

/* The parameters that stand behind recipient i. */
static const char *rcpt_parameters(const struct letter *l, size_t i)
{
	return i < l->own_parameters.count ? l->own_parameters.items[i] :
	    or_empty(options.rcpt_parameters);
}

static void report_json(const struct sender *s, const struct letter *l)
{
	const struct verdict *v = &l->verdict;

	json_begin(stdout, "message", s->start_us);
	printf(",\"n\":%llu", (unsigned long long)l->n);
	json_key(stdout, "source", slice_of(l->source));
	printf(",\"offset\":%llu", (unsigned long long)l->offset);
	json_key(stdout, "id", slice_of(l->id));
	json_text_or_null(stdout, "transid", l->identified ? l->transid : NULL);
	json_key(stdout, "from", slice_of(l->from));
	printf(",\"octets\":%llu,\"fate\":\"%s\",\"to\":[", (unsigned long long)l->octets,
	    bsmtp_fate_name(v->fate));
	for (size_t i = 0; i < l->to->count; i++) {
		const struct verdict *r = &l->verdicts[i];
		fputs(i > 0 ? ",{\"address\":" : "{\"address\":", stdout);
		json_string(stdout, slice_of(l->to->items[i]));
		printf(",\"fate\":\"%s\",\"code\":%d", bsmtp_fate_name(r->fate), r->code);
		json_key(stdout, "status", slice_of(or_empty(r->status)));
		json_key(stdout, "text", slice_of(or_empty(r->text)));
		putchar('}');
	}
	fputs("],\"reply\":", stdout);
	if (v->code == 0) {
		fputs("null", stdout);
	} else {
		printf("{\"code\":%d", v->code);
		json_key(stdout, "status", slice_of(or_empty(v->status)));
		json_key(stdout, "text", slice_of(or_empty(v->text)));
		putchar('}');
	}
	printf(",\"seconds\":%.3f}\n", (double)(l->end_us - l->start_us) / 1e6);
}

static void diag_fate(const struct letter *l, const char *to, const struct verdict *v)
{
	const char *status = or_empty(v->status);
	char reply[1024] = "";

	if (v->code != 0)
		snprintf(reply, sizeof reply, ": %d %s%s%.900s", v->code, status,
		    *status != '\0' ? " " : "", or_empty(v->text));
	else if (v->text != NULL)       /* it was we */
		snprintf(reply, sizeof reply, ": %s", v->text);
	diag("%s: message %llu (offset %llu)%s%s%s: %s%s", shown(l->source), (unsigned long long)l->n,
	    (unsigned long long)l->offset, *to != '\0' ? " to <" : "", to, *to != '\0' ? ">" : "",
	    bsmtp_fate_name(v->fate), reply);
}

/* A recipient's fate is its own refusal, else the message's. */
static void settle_recipients(struct sender *s, struct letter *l)
{
	const struct verdict *all = &l->verdict;

	for (size_t i = 0; i < l->to->count; i++) {
		struct verdict *v = &l->verdicts[i];
		bool refused = v->fate == BSMTP_REJECTED || v->fate == BSMTP_DEFERRED;
		bool own = refused && all->verb != BSMTP_VERB_MAIL && all->fate != BSMTP_UNSENT;
		if (own && all->fate == BSMTP_DELIVERED)
			diag_fate(l, l->to->items[i], v);
		if (!own)
			v->fate = all->fate;
		if (v->fate == BSMTP_REJECTED)  /* 530: only under TLS, or with a name (RFC 3207, 4954) */
			worst(&s->status, (own ? v->code : all->code) == 530 ? EX_NOPERM : EX_UNAVAILABLE);
		else if (v->fate == BSMTP_DEFERRED)
			worst(&s->status, EX_TEMPFAIL);
	}
}

static struct verdict *verdicts_of(struct letter *l)
{
	if (l->verdicts == NULL) {
		l->verdicts = grow(NULL, (l->to->count + 1) * sizeof *l->verdicts);
		memset(l->verdicts, 0, (l->to->count + 1) * sizeof *l->verdicts);
	}
	return l->verdicts;
}

/* After a cut thousands may be in doubt, one behind the other: a line for all. */
static void diag_doubt(struct sender *s)
{
	if (s->doubt_first == s->doubt_last && s->doubt_first != 0)
		diag("message %llu: unknown (sent, and no final reply is certainly its own: it may "
		    "arrive twice if sent again)", (unsigned long long)s->doubt_first);
	else if (s->doubt_first != 0)
		diag("messages %llu to %llu: unknown (sent, and no final reply is certainly their "
		    "own: they may arrive twice if sent again)", (unsigned long long)s->doubt_first,
		    (unsigned long long)s->doubt_last);
	s->doubt_first = s->doubt_last = 0;
}

static void diag_letter(struct sender *s, const struct letter *l)
{
	enum bsmtp_fate fate = l->verdict.fate;

	if (fate == BSMTP_UNKNOWN) {
		if (s->doubt_last + 1 != l->n)
			diag_doubt(s);
		s->doubt_first = s->doubt_first == 0 ? l->n : s->doubt_first;
		s->doubt_last = l->n;
	} else if (fate != BSMTP_DELIVERED && fate != BSMTP_UNSENT) {
		diag_fate(l, "", &l->verdict);
	}
}

/* A fate is final: it is counted, told, and the letter forgotten. */
static void tell(struct sender *s, struct letter *l)
{
	enum bsmtp_fate fate = l->verdict.fate;

	(void)verdicts_of(l);
	settle_recipients(s, l);
	s->counts[fate]++;
	s->progress.messages++;
	if (fate == BSMTP_DELIVERED)
		s->octets += l->octets;
	diag_letter(s, l);
	if (fate == BSMTP_UNKNOWN || (fate == BSMTP_UNSENT && !s->hopeless && options.output == NULL))
		worst(&s->status, EX_TEMPFAIL);
	if (options.json)
		report_json(s, l);
	letter_free(s, l);
}

/* The current letter was not sent; its fate is there already, and none of a server's. */
static void drop(struct sender *s)
{
	struct letter *l = s->current;

	s->current = NULL;
	l->end_us = now_us();
	s->refused += l->verdict.fate == BSMTP_REJECTED;
	tell(s, l);
}

/* ---- fates that are held ----
 *
 * Replies are matched with commands by counting.  A server that leaves one out, or has
 * one too many, shifts all that follow, and nothing tells of it but the end: QUIT gets
 * another reply than 221.  So a fate that would have been another with the replies
 * shifted by one waits for the end.  It is told earlier where nothing is due, or where
 * too much is held. */

/* The first of those held is told.  Where the counting was out, nothing is known of it. */
static void tell_first_held(struct sender *s)
{
	struct letter *l = queue_take(&s->held);

	s->held_weight -= l->weight;
	if (s->on.miscounted) {
		verdict_free(&l->verdict);
		l->verdict.fate = BSMTP_UNKNOWN;
		forget_recipients(l);
	}
	tell(s, l);
}

static void hold_fresh(struct sender *s)
{
	if (s->fresh == NULL)
		return;
	queue_add(&s->held, s->fresh);
	s->held_weight += s->fresh->weight;
	s->fresh = NULL;
	while (s->held_weight > FLIGHT_MAX / 2)
		tell_first_held(s);
}

static void tell_held(struct sender *s)
{
	hold_fresh(s);
	while (s->held.first != NULL)
		tell_first_held(s);
}

/* Keeps a reply's words where somebody asks for them. */
static void keep_reply(struct sender *s, struct letter *l, struct verdict *v,
    const struct bsmtp_client_event *e)
{
	size_t weight = e->status.len + e->text.len + 2;

	*v = (struct verdict){ .fate = e->fate, .verb = e->verb, .code = e->code };
	if (e->code == 0 || (e->fate == BSMTP_DELIVERED && !options.json))
		return;
	v->status = copy_slice(e->status);
	v->text = copy_slice(e->text);
	l->weight += weight;
	s->weight += weight;
}

/* The fate of the first message in flight is known, as far as counting goes. */
static void settle(struct sender *s, const struct bsmtp_client_event *e)
{
	struct letter *l = s->flight.first;

	if (l == NULL)
		return;
	(void)queue_take(&s->flight);
	if (s->current == l)
		s->current = NULL;
	l->end_us = options.json ? now_us() : 0;
	keep_reply(s, l, &l->verdict, e);
	if (e->fate == BSMTP_UNKNOWN && l->position >= bsmtp_client_sent_total(&s->client))
		l->verdict.fate = BSMTP_UNSENT;
	if (e->doubtful)
		forget_recipients(l);
	s->refused += e->fate == BSMTP_REJECTED || e->fate == BSMTP_DEFERRED;
	if (e->code == 0) {             /* no reply decided it, so none can be another's */
		tell(s, l);
		return;
	}
	hold_fresh(s);
	s->fresh = l;
}

static void keep_rcpt(struct sender *s, const struct bsmtp_client_event *e)
{
	struct letter *l = s->flight.first;

	if (l != NULL && e->rcpt < l->to->count)
		keep_reply(s, l, &verdicts_of(l)[e->rcpt], e);
}

/* What was told of recipients is the next ones', and this the first one's. */
static void move_rcpts(struct sender *s, const struct bsmtp_client_event *e)
{
	struct letter *l = s->flight.first;
	struct verdict *v;

	if (l == NULL || l->to->count == 0)
		return;
	v = verdicts_of(l);
	verdict_free(&v[l->to->count - 1]);
	memmove(v + 1, v, (l->to->count - 1) * sizeof *v);
	keep_reply(s, l, v, e);
}

static void report_opening(struct sender *s, const char *agreed)
{
	if (s->on.agreed || s->on.link.in < 0)
		return;
	s->on.agreed = true;
	trace_note(&s->trace, "agreed by %s", agreed);
	if (!options.json)
		return;
	json_begin(stdout, "opening", s->start_us);
	json_key(stdout, "peer", slice_of(s->peer));
	printf(",\"mode\":\"%s\",\"agreed\":\"%s\"", bsmtp_mode_name(s->config.mode), agreed);
	json_version(stdout, &s->on.link);
	fputs("}\n", stdout);
}

static void diag_session(struct sender *s, const struct bsmtp_client_event *e, const char *hint)
{
	char reply[1024] = "";

	if (e->code != 0)
		snprintf(reply, sizeof reply, ": %d %.*s%s%.*s", e->code, (int)e->status.len,
		    e->status.at, e->status.len > 0 ? " " : "", (int)min_size(e->text.len, 900),
		    e->text.at);
	diag("%s: %s%s%s", s->peer, bsmtp_error_text(e->error), reply, hint);
}

/* ---- prearrangement, remembered ---- */

enum { PEERS_MAX = 1 << 20 };   /* octets of the peers file that are read */

/* The file: --peers, else where such files are kept; "" where there is no home. */
static void peers_path(char *path, size_t size)
{
	const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
	bool absolute = state != NULL && *state == '/';

	if (options.peers != NULL)
		snprintf(path, size, "%s", options.peers);
	else if (absolute || (home != NULL && *home == '/'))
		snprintf(path, size, "%s%s/bsmtp/peers", absolute ? state : home,
		    absolute ? "" : "/.local/state");
	else
		*path = '\0';
}

/* The lines of the file but that of this peer, and whether it was there. */
static char *read_peers(const char *path, const char *peer, bool *there)
{
	FILE *f = open_own(path);
	char *rest = grow(NULL, PEERS_MAX), line[512];
	size_t len = 0;

	*there = false;
	while (f != NULL && fgets(line, sizeof line, f) != NULL && len + sizeof line < PEERS_MAX) {
		struct bsmtp_slice name = trim(slice_of(line));
		if (same(name, peer))
			*there = true;
		else if (name.len > 0)
			len += (size_t)snprintf(rest + len, PEERS_MAX - len, "%.*s\n", (int)name.len, name.at);
	}
	rest[len] = '\0';
	if (f != NULL)
		(void)fclose(f);
	return rest;
}

static void make_folders(const char *path)
{
	char dir[PATH_MAX];

	for (size_t i = 1; path[i] != '\0'; i++)
		if (path[i] == '/') {
			snprintf(dir, sizeof dir, "%.*s", (int)i, path);
			(void)mkdir(dir, 0700);
		}
}

/* Writes the file anew, with this peer or without it; whole or not at all. */
static void write_peers(const char *path, const char *rest, const char *peer)
{
	struct fresh file = { .f = NULL };
	FILE *f;

	make_folders(path);
	f = fresh_open(&file, path, 0666);
	if (f != NULL)
		fprintf(f, "%s%s%s", rest, peer, *peer != '\0' ? "\n" : "");
	if (f == NULL || !fresh_keep(&file, true))
		diag("%s: %s", path, strerror(errno));
}

/* Whether the peer is known to speak BSMTP; changes that when it is told to.  What it
 * does under TLS says nothing of what it does in the clear. */
static bool recall_peer(const struct sender *s, bool change, bool speaks)
{
	char path[PATH_MAX], peer[512], *rest;
	bool known;

	peers_path(path, sizeof path);
	if (!s->automatic || *path == '\0' || options.connect_command != NULL)
		return false;
	snprintf(peer, sizeof peer, "%s%s", options.server, options.tls || options.starttls ? " tls" : "");
	rest = read_peers(path, peer, &known);
	if (change && known != speaks)
		write_peers(path, rest, speaks ? peer : "");
	free(rest);
	return known;
}

/* The opening was refused for good, or met by a close. */
static bool is_turned_away(const struct sender *s, enum bsmtp_error error)
{
	return s->config.mode == BSMTP_MODE_BSMTP &&
	    (error == BSMTP_E_REFUSED || error == BSMTP_E_CLOSED);
}

/* --mode auto: a peer that is known opens with BSMTP and waits for nothing, any
 * other with EHLO, whose reply may make it known. */
static void choose_mode(struct sender *s)
{
	if (!s->automatic)
		return;
	s->remembered = recall_peer(s, false, false);
	s->config.mode = s->remembered ? BSMTP_MODE_BSMTP : BSMTP_MODE_PIPELINING;
	s->config.no_grace = s->remembered || s->config.no_grace;
	if (s->remembered && s->fallback == BSMTP_MODES)
		s->fallback = BSMTP_MODE_PIPELINING;
}

/* Whether the opening is another one now: that of --fallback, on a new connection.
 * Only where nothing was streamed. */
static bool falls_back(struct sender *s)
{
	if (s->fallback == BSMTP_MODES)
		return false;
	trace_note(&s->trace, "refused: trying again in mode %s", bsmtp_mode_name(s->fallback));
	s->config.mode = s->fallback;
	s->config.no_grace = false;
	s->fallback = BSMTP_MODES;
	return true;
}

/* The exit status of a session that ended so. */
static int status_of(enum bsmtp_error error)
{
	switch (error) {
	case BSMTP_E_REFUSED:
		return EX_UNAVAILABLE;
	case BSMTP_E_DEFERRED:
	case BSMTP_E_STOPPED:
	case BSMTP_E_CLOSED:
		return EX_TEMPFAIL;
	case BSMTP_E_NO_TLS:
	case BSMTP_E_AUTH:
		return EX_NOPERM;
	default:
		return EX_PROTOCOL;
	}
}

static void on_refused(struct sender *s, const struct bsmtp_client_event *e)
{
	bool away = is_turned_away(s, e->error);

	if (s->on.gave_up)              /* the end is ours, and was told */
		return;
	if (s->on.child > 0 && !s->on.greeted && e->code == 0) {
		diag("%s: it ended before a server had spoken", s->peer);
		worst(&s->status, EX_TEMPFAIL);
		return;
	}
	if (away)
		(void)recall_peer(s, true, false);
	if ((away || e->error == BSMTP_E_REFUSED) && !e->late && falls_back(s)) {
		s->on.again = true;
		return;
	}
	diag_session(s, e, away ? " (does it speak BSMTP? else try --mode pipelining)" : "");
	/* What a late 4yz has left undone shows in the messages' fates. */
	if (e->error != BSMTP_E_DEFERRED || !e->late || e->verb == BSMTP_VERB_AUTH)
		worst(&s->status, status_of(e->error));
	s->hopeless = status_of(e->error) != EX_TEMPFAIL;
	if (e->late && !s->on.half_closed) {
		s->on.half_closed = true;
		link_finish(&s->on.link);
	}
}

/* Only QUIT's reply is missing: that none comes changes nothing. */
static bool is_settled(const struct sender *s)
{
	return s->flight.first == NULL && (s->on.again || (s->source_over && !s->ready));
}

static void on_error(struct sender *s, const struct bsmtp_client_event *e)
{
	s->on.miscounted = s->on.miscounted || is_miscount(e->error);
	/* Who has refused the session for good may well hang up then: what that leaves
	 * undone shows in the messages' fates. */
	if ((!s->on.miscounted && is_settled(s)) || (s->hopeless && e->error == BSMTP_E_CLOSED)) {
		trace_note(&s->trace, "%s", bsmtp_error_text(e->error));
		return;
	}
	if (!s->on.gave_up)
		diag_session(s, e, "");
	s->hopeless = s->hopeless || status_of(e->error) == EX_NOPERM;
	if (!s->on.gave_up || !s->hopeless)
		worst(&s->status, status_of(e->error));
}

/* QUIT was answered: that is the end, if nothing follows its reply. */
static void on_quit(struct sender *s, size_t left)
{
	struct bsmtp_client_event more = { .type = BSMTP_CLIENT_ERROR, .error = BSMTP_E_MISCOUNTED };

	if (left > 0 || link_read(&s->on.link, s->in, sizeof s->in) > 0)
		on_error(s, &more);
}

static void on_event(struct sender *s, struct bsmtp_client_event *e)
{
	if (e->firm && s->fresh != NULL) {
		tell(s, s->fresh);
		s->fresh = NULL;
	}
	switch (e->type) {
	case BSMTP_CLIENT_NONE:
	case BSMTP_CLIENT_SECURE:
	case BSMTP_CLIENT_QUIT:
		break;
	case BSMTP_CLIENT_NOTE:
		diag("%s: %s: %d %.*s%s%.*s", s->peer, bsmtp_verb_name(e->verb), e->code,
		    (int)e->status.len, e->status.at, e->status.len > 0 ? " " : "",
		    (int)min_size(e->text.len, 900), e->text.at);
		break;
	case BSMTP_CLIENT_GREETING:
		/* What a command connects to is there only now. */
		if (s->on.child > 0)
			s->connect_us = now_us() - s->on.dial_us;
		s->on.greeted = true;
		break;
	case BSMTP_CLIENT_OPENED:
		if (bsmtp_client_in_lockstep(&s->client) && s->config.mode != BSMTP_MODE_LOCKSTEP)
			trace_note(&s->trace, "no PIPELINING there: going on in lockstep");
		if (bsmtp_client_offered(&s->client) & BSMTP_KEY_BSMTP)
			(void)recall_peer(s, true, true);
		report_opening(s, s->remembered ? "remembered" : "reply");
		break;
	case BSMTP_CLIENT_REFUSED:
		on_refused(s, e);
		break;
	case BSMTP_CLIENT_RCPT:
		keep_rcpt(s, e);
		break;
	case BSMTP_CLIENT_MOVED:
		move_rcpts(s, e);
		break;
	case BSMTP_CLIENT_MESSAGE:
		report_opening(s, s->remembered ? "remembered" : "grace");
		settle(s, e);
		break;
	case BSMTP_CLIENT_ERROR:
		on_error(s, e);
		break;
	}
}

/* ---- writing the stream ---- */

/* A refusal takes one round trip to come, as connecting did. */
static int64_t default_grace(const struct sender *s)
{
	/* A connection opened fast has measured nothing. */
	int64_t scaled = 3 * s->connect_us + (options.fastopen ? 1000000 : 200000);

	return scaled < 5000000 ? scaled : 5000000;
}

/* What was made of a message too wide is all read. */
static void end_detour(struct sender *s)
{
	if (s->detour == NULL)
		return;
	source_free(s->detour);
	free(s->detour);
	s->detour = NULL;
	s->input = &s->operands;
}

/* Reads on in the source until a message's header is there. */
static void next_message(struct sender *s)
{
	while (!s->ready && !s->source_over) {
		enum got got = source_next(s->input);
		if (got == GOT_WAIT) {
			s->source_waits = true;
			return;
		}
		if (got == GOT_END && s->detour != NULL)
			end_detour(s);
		else if (got == GOT_END)
			s->source_over = true;
		if (got == GOT_DATA) {
			read_header(s->input, &s->header);
			s->ready = true;
		}
	}
}

/* Why the message that is ready cannot be sent; NULL if it can. */
static const char *unsendable(struct sender *s)
{
	if (options.to_headers && s->input->head_long)
		return "its header is too long to look for recipients";
	if (options.to_headers && s->header.malformed)
		return "a line of its header is no field, so that recipients may be missed";
	if (options.to_headers && s->header.bad_recipient)
		return "a recipient field of its header is malformed";
	if (options.to_headers && s->header.to.count + options.to.count == 0)
		return "no recipients in its header";
	if (!options.to_headers && !has_own_envelope(s) && options.to.count == 0)
		return "no recipients: give --to ADDR, or -t to take them from the header";
	if (has_own_envelope(s) && s->input->envelope.to.count == 0)
		return "no recipients in its envelope";
	return NULL;
}

/* Whether the envelope of the current letter or its header needs SMTPUTF8. */
static bool needs_utf8(const struct sender *s)
{
	return s->header.utf8 || s->current->international;
}

static bool names_parameter(const char *list, const char *name)
{
	struct bsmtp_slice rest = slice_of(list);
	struct bsmtp_parameter p;
	ptrdiff_t n;

	for (; (n = bsmtp_parameter_parse(&p, rest.at, rest.len)) > 0;
	    rest = slice(rest.at + n, rest.len - (size_t)n))
		if (same(p.keyword, name))
			return true;
	return false;
}

/* The transaction of the current letter, for a batch, to recipients i to `end`.
 * Nobody says what is offered, and Exim's -bS takes no parameter at all: there are
 * those of the input, and what cannot be left out. */
static void print_letter(const struct sender *s, FILE *f, size_t i, size_t end)
{
	const struct letter *l = s->current;

	fprintf(f, "MAIL FROM:<%s>%s%s\r\n", l->from, l->parameters,
	    needs_utf8(s) && !names_parameter(l->parameters, "SMTPUTF8") ? " SMTPUTF8" : "");
	for (; i < end; i++)
		fprintf(f, "RCPT TO:<%s>%s\r\n", l->to->items[i], rcpt_parameters(l, i));
	fputs("DATA\r\n", f);
}

/* Waits until a message is there, or the input's end. */
static void await_message(struct sender *s)
{
	struct pollfd p = { 0, POLLIN, 0 };

	do {
		s->source_waits = false;
		next_message(s);
		p.fd = s->input->fd;
	} while (s->source_waits && (poll(&p, 1, -1) >= 0 || errno == EINTR));
}

enum { BATCH_STEP = 16 << 10 };

/* The text of the message that is ready, its dots doubled; false where it breaks
 * off.  The buffers of the connection are in use. */
static bool write_batch_text(struct sender *s, FILE *f)
{
	struct bsmtp_encoder encoder = { .dots = true };
	char out[BATCH_STEP];
	enum got got;

	for (;;) {
		struct pollfd p = { s->input->fd, POLLIN, 0 };
		struct bsmtp_slice text;
		size_t made, used;
		got = source_text(s->input, &text);
		if (got == GOT_WAIT && (poll(&p, 1, -1) >= 0 || errno == EINTR))
			continue;
		if (got != GOT_DATA)
			break;
		used = bsmtp_encode(&encoder, out, sizeof out, &made, text.at, text.len);
		fwrite(out, 1, made, f);
		source_taken(s->input, used);
		s->current->octets += used;
	}
	fwrite(out, 1, bsmtp_encode_end(&encoder, out), f);
	s->strays += encoder.strays;
	source_done(s->input);
	return got == GOT_END;
}

/* Writes the message to a file without a name as a batch: one transaction for so
 * many recipients at a time. */
static bool write_detour(struct sender *s, FILE *body, FILE *batch, size_t rcpt_max)
{
	const struct letter *l = s->current;
	bool whole = write_batch_text(s, body) && fflush(body) == 0 && !ferror(body);
	char copy[BATCH_STEP];

	for (size_t i = 0; whole && i < l->to->count; i += rcpt_max) {
		size_t n;
		print_letter(s, batch, i, min_size(i + rcpt_max, l->to->count));
		rewind(body);
		while ((n = fread(copy, 1, sizeof copy, body)) > 0)
			fwrite(copy, 1, n, batch);
		fputs(".\r\n", batch);
		whole = !ferror(body);
	}
	return whole && fflush(batch) == 0 && !ferror(batch);
}

/* The current letter is left, and what is read next is the batch made of it. */
static void take_detour(struct sender *s, size_t rcpt_max)
{
	FILE *body = tmpfile(), *batch = tmpfile();
	struct source *detour;
	int fd = -1;

	if (body != NULL && batch != NULL && write_detour(s, body, batch, rcpt_max))
		fd = dup(fileno(batch));
	if (fd < 0 && s->input->status == EX_OK) {
		diag("temporary file: %s", strerror(errno));
		worst(&s->status, EX_TEMPFAIL);
	}
	if (body != NULL)
		(void)fclose(body);
	if (batch != NULL)
		(void)fclose(batch);
	if (fd < 0) {
		drop(s);
		return;
	}
	letter_free(s, s->current);
	s->current = NULL;
	s->n--;
	detour = grow(NULL, sizeof *detour);
	memset(detour, 0, sizeof *detour);
	source_memory(detour);
	detour->format = FORMAT_BATCH;
	detour->alone = true;
	snprintf(detour->name, sizeof detour->name, "%s", s->operands.name);
	(void)lseek(fd, 0, SEEK_SET);
	(void)source_start(detour, fd);
	s->detour = s->input = detour;
}

/* Begins the message that is ready.  One for more recipients than the server takes
 * in a transaction (RFC 9422) goes by way of a batch of several. */
static void begin_letter(struct sender *s, uint64_t rcpt_max)
{
	const char *why = unsendable(s);
	unsigned usable = bsmtp_client_usable(&s->client);
	struct letter *l;

	l = s->current = letter_new(s);
	s->ready = false;
	s->rcpt = 0;
	if (why != NULL) {
		diag("%s: message %llu (offset %llu): %s", shown(l->source), (unsigned long long)l->n,
		    (unsigned long long)l->offset, why);
		worst(&s->status, EX_DATAERR);
		s->dropping = true;
		return;
	}
	if (l->international && !(usable & BSMTP_KEY_SMTPUTF8)) {    /* RFC 6531 3.2 */
		l->verdict.fate = BSMTP_REJECTED;
		l->verdict.text = copy_slice(slice_of("an address is not ASCII, and the server does "
		    "not offer SMTPUTF8"));
		s->dropping = true;
		return;
	}
	if (rcpt_max > 0 && l->to->count > rcpt_max && s->detour == NULL) {
		take_detour(s, (size_t)rcpt_max);
		return;
	}
	queue_add(&s->flight, l);
	l->position = UINT64_MAX;
	l->identified = (usable & BSMTP_KEY_BSMTP) != 0;
	s->on.transactions++;
	bsmtp_client_mail(&s->client, slice_of(l->from), needs_utf8(s),
	    s->input->format == FORMAT_MESSAGE ? s->input->size : 0, slice_of(l->parameters));
}

/* Feeds text of the message, or drops it: END at its end, DATA when the engine
 * takes no more, WAIT, or ERROR where its end cannot be read. */
static enum got move_text(struct sender *s, bool drop)
{
	enum got got;

	for (;;) {
		struct bsmtp_slice text;
		size_t n;
		got = source_text(s->input, &text);
		if (got != GOT_DATA)
			break;
		n = drop ? text.len : bsmtp_client_body(&s->client, text.at, text.len);
		source_taken(s->input, n);
		if (s->current != NULL)
			s->current->octets += n;
		if (n < text.len)
			return GOT_DATA;
	}
	s->source_waits = got == GOT_WAIT;
	if (got != GOT_WAIT)
		source_done(s->input);
	return got;
}

/* Reads a message that is not to be sent to its end; false when it must wait. */
static bool drop_letter(struct sender *s)
{
	if (move_text(s, true) == GOT_WAIT)
		return false;
	if (s->current != NULL)
		drop(s);
	s->dropping = false;
	return true;
}

static bool write_body(struct sender *s)
{
	/* Until octets of the body have left, it cannot have arrived. */
	if (s->current->position == UINT64_MAX)
		s->current->position = bsmtp_client_position(&s->client);
	switch (move_text(s, false)) {
	case GOT_DATA:
		return bsmtp_client_want(&s->client) == BSMTP_WANT_BODY;
	case GOT_WAIT:
		return false;
	case GOT_ERROR:                 /* what was read of it must not count */
		s->on.cut = !bsmtp_client_abandon(&s->client);
		break;
	case GOT_END:
		bsmtp_client_body_end(&s->client);
		break;
	}
	s->current = NULL;
	return !s->on.cut;
}

static void next_rcpt(struct sender *s)
{
	bsmtp_client_rcpt(&s->client, slice_of(s->current->to->items[s->rcpt]),
	    slice_of(rcpt_parameters(s->current, s->rcpt)));
	if (++s->rcpt == s->current->to->count)
		bsmtp_client_rcpt_end(&s->client);
}

/* Whether as much is in flight as may be; then until it is half of that: a letter for
 * each reply, where the server is the slower one, would make every write a small one. */
static bool fully_laden(struct sender *s)
{
	s->laden = s->weight - s->held_weight > (s->laden ? FLIGHT_MAX / 2 : FLIGHT_MAX);
	return s->laden;
}

/* Whether the message that is ready has a TRANSID. */
static bool has_transid(const struct sender *s)
{
	const char *given = or_empty(s->input->envelope.from != NULL ?
	    s->input->envelope.parameters : options.parameters);

	return options.transid || names_parameter(given, "TRANSID");
}

/* Whether an address of the message that is ready is not ASCII. */
static bool has_8bit_address(struct sender *s)
{
	const struct list *to = has_own_envelope(s) ? &s->input->envelope.to : &options.to;

	return bsmtp_has_8bit(slice_of(envelope_sender(s))) || list_has_8bit(to) ||
	    (options.to_headers && list_has_8bit(&s->header.to));
}

/* Whether the message that is ready has to wait for the reply to the opening, for it has
 * what may only be sent where that is offered: a TRANSID, or in the manners of EHLO an
 * address that is not ASCII.  Who opens with BSMTP waits no longer than a grace. */
static bool must_hear(struct sender *s)
{
	if (bsmtp_client_awaits(&s->client) > BSMTP_VERB_BSMTP)
		return false;           /* it is there */
	if (s->config.mode != BSMTP_MODE_BSMTP)
		return has_transid(s) || has_8bit_address(s);
	return has_transid(s) &&
	    (!s->on.grace_waited || now_us() < s->on.grace_start_us + default_grace(s));
}

/* Between messages: the next one, or the end.  A server that takes only so many in
 * a session (RFC 9422) is called again for the rest. */
static bool write_next(struct sender *s)
{
	uint64_t mails, rcpts;

	if (fully_laden(s))
		return false;
	next_message(s);
	bsmtp_client_limits(&s->client, &mails, &rcpts);
	s->on.again = s->ready && mails > 0 && s->on.transactions >= mails;
	if (!s->ready || s->on.again || (options.stop_after > 0 && s->refused >= options.stop_after)) {
		if (!s->source_waits)
			bsmtp_client_quit(&s->client);
	} else if (!must_hear(s) || !bsmtp_client_await_opening(&s->client)) {
		begin_letter(s, rcpts);
	}
	return !s->source_waits;
}

/* One thing that the engine wants; false when it must wait. */
static bool write_step(struct sender *s)
{
	struct bsmtp_client_event e;

	s->source_waits = false;
	if (s->dropping)
		return drop_letter(s);
	switch (bsmtp_client_want(&s->client)) {
	case BSMTP_WANT_MAIL:
		return write_next(s);
	case BSMTP_WANT_RCPT:
		if (s->rcpt < s->current->to->count)
			next_rcpt(s);
		else
			bsmtp_client_data(&s->client);
		return true;
	case BSMTP_WANT_BODY:
		return write_body(s);
	case BSMTP_WANT_SKIP:
		if (move_text(s, true) == GOT_WAIT)
			return false;
		bsmtp_client_skipped(&s->client, &e);
		on_event(s, &e);
		s->current = NULL;
		return true;
	case BSMTP_WANT_ROOM:
	case BSMTP_WANT_GRACE:
	case BSMTP_WANT_TLS:
	case BSMTP_WANT_SECURED:
	case BSMTP_WANT_REPLY:
	case BSMTP_WANT_NOTHING:
		break;
	}
	return false;
}

static void write_pending(struct sender *s)
{
	size_t len;
	const char *out;

	while (out = bsmtp_client_out(&s->client, &len), len > 0 && !s->on.broken) {
		ssize_t n = link_write(&s->on.link, out, len);
		if (n == LINK_AGAIN)
			return;
		if (n == LINK_FAILED) {
			trace_note(&s->trace, "writing: %s", strerror(errno));
			s->on.broken = true;       /* what it said before is still to be read */
			return;
		}
		bsmtp_client_sent(&s->client, (size_t)n);
		s->on.progress_us = now_us();
		s->on.turned = false;
	}
}

static void flush_out(struct sender *s)
{
	size_t len;
	bool hold;

	(void)bsmtp_client_out(&s->client, &len);
	hold = is_tls(&s->on.link) && len > TLS_RECORD;
	if (hold)
		link_hold(&s->on.link, true);
	write_pending(s);
	if (hold)
		link_hold(&s->on.link, false);
}

/* A turnaround: nothing is left that may be sent, and the server's word is
 * waited for. */
static void note_turnaround(struct sender *s)
{
	s->on.turned = true;
	s->turnarounds++;
	trace_note(&s->trace, "turnaround %llu", (unsigned long long)s->turnarounds);
}

static void count_turnaround(struct sender *s)
{
	enum bsmtp_want want = bsmtp_client_want(&s->client);
	size_t len;

	(void)bsmtp_client_out(&s->client, &len);
	if (s->on.turned || len > 0 || s->on.half_closed || s->on.broken || s->on.cut)
		return;
	if (want == BSMTP_WANT_REPLY || want == BSMTP_WANT_GRACE || want == BSMTP_WANT_TLS ||
	    fully_laden(s))
		note_turnaround(s);
}

/* How long the grace lasts now: for a message with a TRANSID not less than by default,
 * for it is the reply to the opening that says whether it may be sent. */
static int64_t grace_length(const struct sender *s)
{
	int64_t given = (int64_t)options.grace_ms * 1000, usual = default_grace(s);

	if (!options.grace_given || (given < usual && s->ready && has_transid(s)))
		return usual;
	return given;
}

/* The silence allowed by default where a server may be storing a message. */
enum { VERDICT_MS = 600000 };

/* The silence allowed: while the verdict on a body is due, RFC 5321 4.5.3.2.6 has more. */
static uint64_t silence_ms(const struct sender *s)
{
	bool verdict = bsmtp_client_awaits(&s->client) == BSMTP_VERB_BODY;

	return verdict && !options.timeout_given ? VERDICT_MS : options.timeout_ms;
}

/* When to stop waiting: the grace's end, the silence's end; 0: never. */
static int64_t wait_until(struct sender *s)
{
	enum bsmtp_want want = bsmtp_client_want(&s->client);
	size_t len;

	if (want == BSMTP_WANT_GRACE && (s->on.child == 0 || s->on.greeted)) {
		if (!s->on.grace_waited)
			s->on.grace_start_us = now_us();
		s->on.grace_waited = true;
		return s->on.grace_start_us + grace_length(s);
	}
	(void)bsmtp_client_out(&s->client, &len);
	if (s->source_waits && len == 0 && bsmtp_client_owed(&s->client) == 0)
		return 0;
	return s->on.progress_us + (int64_t)silence_ms(s) * 1000;
}

static void session_over(struct sender *s)
{
	struct bsmtp_client_event e;

	bsmtp_client_closed(&s->client, &e);
	on_event(s, &e);
}

static void on_time(struct sender *s)
{
	if (bsmtp_client_want(&s->client) == BSMTP_WANT_GRACE && s->on.grace_waited) {
		s->grace_us = now_us() - s->on.grace_start_us;
		bsmtp_client_grace_over(&s->client);
		s->on.progress_us = now_us();
		report_opening(s, "grace");
		return;
	}
	if (!is_settled(s)) {
		diag("%s: silent for %.3g s, giving up", s->peer, (double)silence_ms(s) / 1e3);
		worst(&s->status, EX_TEMPFAIL);
	}
	s->on.gave_up = true;
	session_over(s);
}

/* The server is gone.  Under TLS it may be that it did not like our certificate. */
static void read_failed(struct sender *s, bool error)
{
	const char *why = link_tls_why(&s->on.link), *hint = link_tls_hint(&s->on.link);
	bool refused = !link_was_cut(&s->on.link) && (*hint != '\0' || !bsmtp_client_offered(&s->client));

	if (error && *why != '\0' && refused) {
		diag("%s: TLS: %s%s", s->peer, why, hint);
		worst(&s->status, EX_NOPERM);
		s->on.gave_up = true;
	} else if (error) {
		trace_note(&s->trace, "reading: %s", *why != '\0' ? why : strerror(errno));
	}
	session_over(s);
}

/* ---- TLS ---- */

/* Sends what is to be sent; whether that is all gone. */
static bool flushed(struct sender *s)
{
	size_t len;

	flush_out(s);
	(void)bsmtp_client_out(&s->client, &len);
	return len == 0;
}

/* TLS did not come about: nothing of the mail was taken. */
static void no_tls(struct sender *s, int status, const char *why)
{
	if (why != NULL)
		diag("%s: TLS: %s", s->peer, why);
	worst(&s->status, status);
	s->hopeless = s->hopeless || status == EX_NOPERM;
	s->on.gave_up = s->on.broken = true;
	session_over(s);
}

static void tls_silent(const struct sender *s)
{
	diag("%s: TLS: silent for %.3g s, giving up", s->peer, (double)options.timeout_ms / 1e3);
}

/* Writes on what must be gone before anything else; 0 when it is. */
static ssize_t write_out(struct sender *s, ssize_t (*step)(struct link *), int64_t end)
{
	ssize_t n;

	while ((n = step(&s->on.link)) == LINK_AGAIN && now_us() < end) {
		struct pollfd p = { s->on.link.out, POLLOUT, 0 };
		(void)poll(&p, 1, 1000);
	}
	return n;
}

/* Early data that was not taken goes again. */
static int send_again(struct sender *s, int64_t end)
{
	bool early = link_sent_early(&s->on.link), taken = early && link_early_taken(&s->on.link);
	ssize_t n;

	if (early)
		trace_note(&s->trace, "early data: %s", taken ? "accepted" : "not accepted: it is sent again");
	s->on.turned = taken;           /* what answers it was asked for with the handshake */
	n = write_out(s, link_send_again, end);
	if (n == 0)
		return EX_OK;
	if (n == LINK_AGAIN)
		tls_silent(s);
	else
		diag_tls(&s->on.link, s->peer);
	return EX_TEMPFAIL;
}

/* The handshake to its end, within the timeout; EX_OK when the link is secure. */
static int shake_hands(struct sender *s)
{
	int64_t end = now_us() + (int64_t)options.timeout_ms * 1000;
	unsigned turns = s->on.turned ? 1 : 0;  /* the opening's */

	for (;;) {
		ssize_t n = link_handshake(&s->on.link);
		struct pollfd p = { s->on.link.in, link_events(&s->on.link, true, false), 0 };
		int64_t left = end - now_us();
		for (; turns < link_tls_turns(&s->on.link) && p.events == POLLIN; turns++)
			note_turnaround(s);
		if (n == LINK_FAILED) {
			diag_tls(&s->on.link, s->peer);
			return link_was_cut(&s->on.link) ? EX_TEMPFAIL : EX_NOPERM;
		}
		if (n != LINK_AGAIN)
			break;
		if (left <= 0) {
			tls_silent(s);
			return EX_TEMPFAIL;
		}
		(void)poll(&p, 1, (int)min_size((size_t)left / 1000 + 1, 3600000));
	}
	s->on.turned = false;
	if (!link_pin_good(&s->on.link, s->tls)) {
		diag("%s: the certificate is not the one of --pin", s->peer);
		return EX_NOPERM;
	}
	return send_again(s, end);
}

/* Whom the certificate must be for: --tls-name, else the host that was called. */
static const char *tls_name(void)
{
	static struct address a;

	if (options.tls_name != NULL)
		return options.tls_name;
	return options.connect_command == NULL && parse_address(&a, options.server) && !a.local ?
	    a.host : "localhost";
}

static bool start_tls_to_server(struct sender *s, bool gated)
{
	bool alpn = s->config.mode == BSMTP_MODE_BSMTP;

	if (!link_connect_tls(&s->on.link, s->tls, tls_name(), options.server, alpn, gated)) {
		no_tls(s, EX_NOPERM, "it cannot begin: out of memory, or --tls-name is no name");
		return false;
	}
	s->on.turned = false;
	return true;
}

/* The opening and as much of the stream as may go with the ClientHello: the ticket
 * says that the server has agreed to BSMTP before.  With Fast Open the connection is
 * only made here, and may fail here. */
static int send_early(struct sender *s)
{
	bool more = true;
	ssize_t n;

	s->trace.tls = true;
	bsmtp_client_secured(&s->client, true);
	while (more) {
		for (more = false; bsmtp_client_want(&s->client) != BSMTP_WANT_NOTHING && write_step(s);)
			more = true;
		more = flushed(s) && more;
	}
	n = write_out(s, link_send_flight, now_us() + (int64_t)options.timeout_ms * 1000);
	if (n == LINK_AGAIN)
		tls_silent(s);
	else if (n == LINK_FAILED)
		diag("%s: %s", s->peer, strerror(errno));
	return n == 0 ? EX_OK : EX_TEMPFAIL;
}

/* TLS is complete: the session begins, or begins anew. */
static bool secure(struct sender *s)
{
	bool agreed, early = link_early(&s->on.link);
	int status = early ? send_early(s) : EX_OK;

	if (status == EX_OK)
		status = shake_hands(s);
	if (status != EX_OK) {
		no_tls(s, status, NULL);
		return false;
	}
	agreed = link_agreed(&s->on.link);
	trace_note(&s->trace, "%s%s%s", or_empty(link_version(&s->on.link)),
	    link_resumed(&s->on.link) ? ", resumed" : "", agreed ? ", agreed by ALPN" : "");
	s->trace.tls = true;
	if (!early || !agreed)          /* or the ticket has promised too much */
		bsmtp_client_secured(&s->client, agreed);
	if (agreed || early)
		report_opening(s, agreed ? "alpn" : "remembered");
	s->on.progress_us = now_us();
	return true;
}

/* The reply that TLS follows was read, and octets behind it.  Those behind the reply
 * to BSMTP's opening are TLS already; behind that to STARTTLS there must be none, for
 * nobody has spoken TLS yet: somebody has put them there (CVE-2011-0411's twin). */
static void turn_to_tls(struct sender *s, struct bsmtp_slice rest)
{
	if (s->on.link.tls == NULL && rest.len > 0)
		no_tls(s, EX_NOPERM, "octets behind the reply to STARTTLS: somebody is in between");
	else if (s->on.link.tls == NULL ? start_tls_to_server(s, false) :
	    link_open_gate(&s->on.link, rest))
		(void)secure(s);
}

static void read_replies(struct sender *s)
{
	ssize_t n = link_read(&s->on.link, s->in, sizeof s->in);
	size_t used = 0;

	if (n == LINK_AGAIN)
		return;
	s->on.progress_us = now_us();
	if (n <= 0) {
		read_failed(s, n < 0);
		return;
	}
	while (used < (size_t)n) {
		struct bsmtp_client_event e;
		bool grace = bsmtp_client_want(&s->client) == BSMTP_WANT_GRACE;
		used += bsmtp_client_in(&s->client, s->in + used, (size_t)n - used, &e);
		if (grace && s->on.grace_waited && bsmtp_client_want(&s->client) != BSMTP_WANT_GRACE)
			s->grace_us = now_us() - s->on.grace_start_us;
		on_event(s, &e);
		if (e.type == BSMTP_CLIENT_QUIT)
			on_quit(s, (size_t)n - used);
		if (e.type == BSMTP_CLIENT_SECURE) {
			turn_to_tls(s, slice(s->in + used, (size_t)n - used));
			return;
		}
	}
}

static void wait_for_more(struct sender *s)
{
	struct pollfd p[3] = { { s->on.link.in, POLLIN, 0 }, { -1, POLLOUT, 0 }, { -1, POLLIN, 0 } };
	int64_t until = wait_until(s), left = until - now_us();
	size_t len;
	int n;

	if (link_pending(&s->on.link)) {
		read_replies(s);
		return;
	}
	(void)bsmtp_client_out(&s->client, &len);
	if (len > 0 && !s->on.broken)
		p[1].fd = s->on.link.out;
	p[0].events = link_events(&s->on.link, true, false);
	p[1].events = link_events(&s->on.link, false, true);
	if (s->source_waits)
		p[2].fd = s->input->fd;
	if (options.json)
		fflush(stdout);
	n = poll(p, COUNT(p), until == 0 ? -1 : left <= 0 ? 0 :
	    left > 3600000000 ? 3600000 : (int)((left + 999) / 1000));
	if (until == 0)                 /* nothing was due: silence begins now */
		s->on.progress_us = now_us();
	if (n > 0 && p[0].revents != 0)
		read_replies(s);
	else if (n == 0 && until != 0 && now_us() >= until)
		on_time(s);
}

static void show_progress(struct sender *s)
{
	s->progress.octets = s->input->passed + s->input->offset;
	progress(&s->progress, false);
}

/* The octets of all inputs, where all are files of a known size. */
static uint64_t input_size(void)
{
	uint64_t size = 0;
	struct stat st;

	for (size_t i = 0; i < options.operands.count; i++) {
		if (stat(options.operands.items[i], &st) != 0 || !S_ISREG(st.st_mode))
			return 0;
		size += (uint64_t)st.st_size;
	}
	return size;
}

static void converse(struct sender *s)
{
	while (bsmtp_client_want(&s->client) != BSMTP_WANT_NOTHING) {
		size_t len;
		if (bsmtp_client_want(&s->client) == BSMTP_WANT_TLS && s->on.link.tls == NULL &&
		    flushed(s) && !start_tls_to_server(s, true))
			break;          /* our first flight goes with the opening */
		while (!s->on.broken && !s->on.cut && write_step(s))
			;
		flush_out(s);
		(void)bsmtp_client_out(&s->client, &len);
		if (len == 0 && !s->on.broken && !s->on.cut && !s->source_waits && !fully_laden(s) &&
		    bsmtp_client_want(&s->client) < BSMTP_WANT_GRACE) {
			read_replies(s);        /* what is there; it does not wait */
			show_progress(s);
			continue;
		}
		if ((s->on.broken || (s->on.cut && len == 0)) && !s->on.half_closed) {
			s->on.half_closed = true;
			link_finish(&s->on.link);
		}
		if (s->source_waits && bsmtp_client_owed(&s->client) == 0)
			tell_held(s);   /* whoever reads along is not to wait for the input */
		count_turnaround(s);
		show_progress(s);
		wait_for_more(s);
	}
}

/* How long a pipe is read for the mere names of what was not sent. */
enum { PATIENCE_US = 2000000 };

/* What was begun is judged; what was not is read to its end and named. */
static void settle_rest(struct sender *s)
{
	struct bsmtp_client_event e;
	int64_t end;

	while (bsmtp_client_unsettled(&s->client, &e))
		on_event(s, &e);
	tell_held(s);
	end = now_us() + PATIENCE_US;
	for (;;) {
		struct pollfd p = { s->input->fd, POLLIN, 0 };
		s->source_waits = false;
		if (s->input->in_message && !s->ready)
			(void)drop_letter(s);
		else if (s->ready)
			s->current = letter_new(s);
		else if (s->source_over)
			return;
		else
			next_message(s);
		s->ready = s->ready && s->current == NULL;
		if ((s->source_waits && poll(&p, 1, PATIENCE_US / 1000) == 0) ||
		    (!s->input->regular && now_us() > end)) {
			diag("%s: the rest of the input was not read", shown(s->input->name));
			worst(&s->status, EX_TEMPFAIL);
			if (s->current != NULL)
				drop(s);
			return;
		}
	}
}

static void report_summary(struct sender *s)
{
	uint64_t messages = 0;

	for (int fate = 0; fate < BSMTP_FATES; fate++)
		messages += s->counts[fate];
	s->progress.octets = s->input->passed + s->input->offset;
	progress(&s->progress, true);
	diag_doubt(s);
	if (s->counts[BSMTP_UNSENT] > 0 && options.output == NULL)
		diag("%llu of %llu messages were not sent",
		    (unsigned long long)s->counts[BSMTP_UNSENT], (unsigned long long)messages);
	if (!options.json)
		return;
	json_begin(stdout, "summary", s->start_us);
	printf(",\"messages\":%llu", (unsigned long long)messages);
	for (int fate = 0; fate < BSMTP_FATES; fate++)
		printf(",\"%s\":%llu", bsmtp_fate_name((enum bsmtp_fate)fate),
		    (unsigned long long)s->counts[fate]);
	printf(",\"octets\":%llu,\"seconds\":%.3f,\"turnarounds\":%llu,\"connect_seconds\":%.6f,"
	    "\"grace_seconds\":%.3f,\"stray_cr\":%llu}\n", (unsigned long long)s->octets,
	    (double)(now_us() - s->start_us) / 1e6, (unsigned long long)s->turnarounds,
	    (double)s->connect_us / 1e6, (double)s->grace_us / 1e6,
	    (unsigned long long)s->strays);
}

/* ---- the stream at rest ---- */

/* What would be sent, as an RFC 2442 object.  A message that breaks off is taken
 * out again, where the file lets it; else nothing may follow it. */
static bool write_batch_message(struct sender *s, FILE *f)
{
	off_t at = ftello(f);
	const char *why = unsendable(s);
	bool whole;

	s->current = letter_new(s);
	s->ready = false;
	if (why != NULL) {
		diag("%s: message %llu (offset %llu): %s", shown(s->current->source),
		    (unsigned long long)s->current->n, (unsigned long long)s->current->offset, why);
		worst(&s->status, EX_DATAERR);
		(void)drop_letter(s);
		return true;
	}
	print_letter(s, f, 0, s->current->to->count);
	whole = write_batch_text(s, f);
	if (whole)
		fputs(".\r\n", f);
	s->current->identified = whole;
	drop(s);
	return whole || (at >= 0 && fflush(f) == 0 && fseeko(f, at, SEEK_SET) == 0 &&
	    ftruncate(fileno(f), at) == 0);
}

static int write_batch(struct sender *s)
{
	bool standard = strcmp(options.output, "-") == 0, good = true;
	struct fresh file = { .f = NULL };
	FILE *f = standard ? stdout : fresh_open(&file, options.output, 0600);

	if (f == NULL) {
		diag("%s: %s", options.output, strerror(errno));
		return EX_CANTCREAT;
	}
	fprintf(f, "EHLO %s\r\n", s->config.helo);
	for (await_message(s); s->ready && good; await_message(s))
		good = write_batch_message(s, f);
	if (good)
		fputs("QUIT\r\n", f);
	good = fflush(f) == 0 && !ferror(f) && (standard || fsync(fileno(f)) == 0 || errno == EINVAL);
	if (standard ? !good : !fresh_keep(&file, good)) {
		diag("%s: %s", options.output, strerror(errno));
		worst(&s->status, EX_IOERR);
	}
	report_summary(s);
	return s->status;
}

/* ---- the network ---- */

/* Through a command: its standard input and output are two pipes to us.  One socket for
 * both would be one open file, and whoever sets it non-blocking does so for all in a
 * pipeline. */
static int dial_command(struct sender *s)
{
	int in[2] = { -1, -1 }, out[2] = { -1, -1 };

	snprintf(s->peer, sizeof s->peer, "%s", options.connect_command);
	if (pipe(in) != 0 || pipe(out) != 0 || !set_flags(in[0]) || !set_flags(out[1]) ||
	    (s->on.child = fork()) < 0) {
		diag("%s: %s", s->peer, strerror(errno));
		return EX_OSERR;
	}
	if (s->on.child == 0) {
		(void)signal(SIGPIPE, SIG_DFL);
		(void)signal(SIGXFSZ, SIG_DFL);
		if (dup2(out[0], STDIN_FILENO) >= 0 && dup2(in[1], STDOUT_FILENO) >= 0 &&
		    close(out[0]) == 0 && close(in[1]) == 0)
			execl("/bin/sh", "sh", "-c", options.connect_command, (char *)NULL);
		_exit(127);
	}
	close(out[0]);
	close(in[1]);
	s->on.link = (struct link){ in[0], out[1], NULL };
	trace_note(&s->trace, "started: %s", options.connect_command);
	return EX_OK;
}

/* Waits for the command so many milliseconds, and for ever where that is 0. */
static bool command_over(pid_t child, uint64_t ms, int *how)
{
	int64_t until = now_us() + (int64_t)ms * 1000;
	pid_t got;

	while (((got = waitpid(child, how, ms > 0 ? WNOHANG : 0)) == 0 && now_us() < until) ||
	    (got < 0 && errno == EINTR))
		pause_ms(10);
	return got != 0;
}

enum { COMMAND_END_MS = 2000 };

/* The command has done its work when the connection is closed: it has the timeout for what
 * is left to do, then it is asked to end, and then it is ended.  What has been told is
 * printed before. */
static void end_command(struct sender *s)
{
	int how = 0;

	if (s->on.child <= 0)
		return;
	(void)fflush(stdout);
	if (!command_over(s->on.child, options.timeout_ms, &how)) {
		diag("%s: still there, and ended", s->peer);
		(void)kill(s->on.child, SIGTERM);
		if (!command_over(s->on.child, COMMAND_END_MS, &how) && kill(s->on.child, SIGKILL) == 0)
			(void)command_over(s->on.child, 0, &how);
	} else if (WIFEXITED(how) && WEXITSTATUS(how) != 0) {
		diag("%s: exit status %d", s->peer, WEXITSTATUS(how));
	} else if (WIFSIGNALED(how)) {
		diag("%s: ended by signal %d", s->peer, WTERMSIG(how));
	}
}

static bool speaks_first(const struct sender *s)
{
	return options.tls || ((s->config.mode == BSMTP_MODE_BSMTP || s->config.mode == BSMTP_MODE_EARLY) &&
	    !s->config.await_greeting);
}

static int dial_address(struct sender *s, const struct addrinfo *found)
{
	struct sockaddr_storage peer;
	socklen_t len = sizeof peer;
	int fd = connect_any(found, (int64_t)options.timeout_ms * 1000, options.fastopen && speaks_first(s),
	    &s->connect_us);

	if (fd < 0) {
		diag("%s: %s", options.server, strerror(errno));
		return EX_TEMPFAIL;
	}
	s->on.link = (struct link){ fd, fd, NULL };
	if (found->ai_family != AF_UNIX && getpeername(fd, (struct sockaddr *)(void *)&peer, &len) == 0)
		name_address(s->peer, sizeof s->peer, (struct sockaddr *)(void *)&peer, len);
	trace_note(&s->trace, "connected to %s in %.3f ms", s->peer, (double)s->connect_us / 1e3);
	return EX_OK;
}

/* Makes the link to the server; the exit status of not getting one. */
static int dial(struct sender *s)
{
	struct address a;
	struct addrinfo *found = NULL;
	struct sockaddr_un un;
	struct addrinfo local;
	int error, status;

	if (options.connect_command != NULL)
		return dial_command(s);
	if (!parse_address(&a, options.server)) {
		diag("--server %s: not an address (host, host:port, [v6]:port, unix:/path)",
		    options.server);
		return EX_USAGE;
	}
	snprintf(s->peer, sizeof s->peer, "%s", options.server);
	if (a.local) {
		memset(&local, 0, sizeof local);
		local.ai_family = AF_UNIX;
		local.ai_addr = (struct sockaddr *)(void *)&un;
		local.ai_addrlen = local_address(&un, a.host);
		return dial_address(s, &local);
	}
	error = resolve(&a, false, &found);
	if (error != 0) {
		diag("%s: %s", options.server, gai_strerror(error));
		return EX_NOHOST;
	}
	status = dial_address(s, found);
	freeaddrinfo(found);
	return status;
}

/* Nobody was named, and the input is no batch that names them. */
static bool lacks_recipients(const struct sender *s)
{
	bool given = options.to.count > 0 || options.to_headers;

	return !given && (s->ready ? !has_own_envelope(s) : options.format == FORMAT_AUTO &&
	    s->input->status == EX_OK);
}

/* One connection, from the call to the last reply; the exit status of having none. */
static int hold_dialogue(struct sender *s)
{
	int status;

	memset(&s->on, 0, sizeof s->on);
	s->on.link = (struct link){ -1, -1, NULL };
	s->on.dial_us = now_us();
	status = dial(s);
	if (status != EX_OK)
		return status;
	s->on.progress_us = now_us();
	s->trace.tls = options.tls;     /* what is written first goes inside, too */
	bsmtp_client_init(&s->client, &s->config, s->out, sizeof s->out, s->due, sizeof s->due);
	if (options.tls && start_tls_to_server(s, false))
		(void)secure(s);
	if (s->config.no_grace && s->config.mode == BSMTP_MODE_BSMTP && !s->config.await_greeting)
		trace_note(&s->trace, "no grace");
	converse(s);
	tell_held(s);
	s->on.again = s->on.again && s->flight.first == NULL && !s->on.miscounted;
	s->strays += bsmtp_client_strays(&s->client);
	wipe(s->out, options.user != NULL ? sizeof s->out : 0);
	if (is_tls(&s->on.link) && !s->on.broken && !s->on.cut)
		tls_finish(&s->on.link);
	link_close(&s->on.link);
	end_command(s);
	return EX_OK;
}

static int send_mail(struct sender *s)
{
	int status;

	await_message(s);       /* no connection before there is something to send */
	if (lacks_recipients(s)) {
		diag("no recipients: give --to ADDR, or -t to take them from the header");
		return EX_USAGE;
	}
	if (!s->ready) {
		if (s->status == EX_OK && s->input->status == EX_OK)
			diag("nothing to send");
		report_summary(s);
		return EX_OK;
	}
	do
		status = hold_dialogue(s);
	while (status == EX_OK && s->on.again);
	if (status == EX_USAGE)
		return status;
	worst(&s->status, status);
	settle_rest(s);
	report_summary(s);
	return s->status;
}

/* ---- raw: for finding out what a server does with anything ---- */

/* Replies as they come, a line each with its time. */
static void print_raw(struct sender *s, const char *in, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		bool full = s->raw_len == sizeof s->raw;
		if (in[i] != '\n' && !full)
			s->raw[s->raw_len++] = in[i];
		if (in[i] != '\n' && !full)
			continue;
		if (s->raw_len > 0 && s->raw[s->raw_len - 1] == '\r')
			s->raw_len--;
		printf("%10.3f <- ", (double)(now_us() - s->start_us) / 1e3);
		put_safe(stdout, slice(s->raw, s->raw_len));
		putchar('\n');
		s->raw_len = 0;
		i -= full;
	}
	(void)fflush(stdout);
}

/* Octets of the input for the network; END behind the last file. */
static enum got raw_input(struct sender *s, struct bsmtp_slice *text)
{
	for (;;) {
		enum got got;
		if (!s->input->opened && !source_open(s->input))
			return GOT_END;
		got = source_text(s->input, text);
		if (got == GOT_DATA || got == GOT_WAIT)
			return got;
		source_close(s->input);
	}
}

/* Both ways at once, until the server closes, or is silent behind the input's end. */
static int converse_raw(struct sender *s)
{
	bool over = false;

	for (;;) {
		struct pollfd p[3] = { { s->on.link.in, POLLIN, 0 }, { -1, POLLOUT, 0 }, { -1, POLLIN, 0 } };
		struct bsmtp_slice text = { NULL, 0 };
		enum got got = over ? GOT_END : raw_input(s, &text);
		ssize_t n;
		over = got == GOT_END;
		if (got == GOT_DATA) {
			n = link_write(&s->on.link, text.at, text.len);
			if (n == LINK_FAILED)
				over = true;
			if (n > 0)
				source_taken(s->input, (size_t)n);
			p[1].fd = n == LINK_AGAIN ? s->on.link.out : -1;
		}
		p[2].fd = got == GOT_WAIT ? s->input->fd : -1;
		n = poll(p, COUNT(p), got == GOT_DATA && p[1].fd < 0 ? 0 : !over ? -1 :
		    (int)min_size((size_t)options.timeout_ms, INT_MAX));
		if (n == 0 && over)
			break;
		if (n <= 0 || p[0].revents == 0)
			continue;
		n = link_read(&s->on.link, s->in, sizeof s->in);
		if (n > 0)
			print_raw(s, s->in, (size_t)n);
		else if (n != LINK_AGAIN)
			break;
	}
	if (s->raw_len > 0)
		print_raw(s, "\n", 1);
	return EX_OK;
}

static int send_raw(struct sender *s)
{
	int status = dial(s);

	if (status != EX_OK)
		return status;
	status = converse_raw(s);
	link_close(&s->on.link);
	end_command(s);
	return status;
}

/* Hexadecimal digits that nobody can guess. */
static bool random_key(char *out, size_t size)
{
	unsigned char octets[64];
	bool good = random_octets(octets, size / 2);

	if (good)
		print_hex(out, octets, size / 2);
	return good;
}

static int send_main(void)
{
	struct sender *s = grow(NULL, sizeof *s);
	int status;

	memset(s, 0, sizeof *s);
	s->on.link = (struct link){ -1, -1, NULL };
	s->automatic = options.mode == BSMTP_MODES;
	s->fallback = (enum bsmtp_mode)options.fallback;
	s->start_us = s->trace.start_us = s->progress.start_us = now_us();
	s->progress.input = input_size();
	s->input = &s->operands;
	source_memory(s->input);
	s->config = (struct bsmtp_client_config){
		.mode = (enum bsmtp_mode)options.mode,
		.framing = (enum bsmtp_framing)options.framing,
		.await_greeting = options.await_greeting,
		.no_grace = options.grace_given && options.grace_ms == 0,
		.blind = options.blind,
		.starttls = options.starttls,
		.helo = options.helo != NULL ? options.helo : host_name(),
		.user = options.user,
		.password = options.password,
		.tap = options.trace ? trace_tap : NULL,
		.tap_context = &s->trace,
	};
	choose_mode(s);
	if (options.transid && !random_key(s->key, sizeof s->key)) {
		diag("/dev/urandom: %s", strerror(errno));
		status = EX_OSERR;
	} else if ((options.tls || options.starttls) && (s->tls = tls_client_context()) == NULL)
		status = EX_USAGE;
	else
		status = options.format == FORMAT_RAW ? send_raw(s) :
		    options.output != NULL ? write_batch(s) : send_mail(s);
	worst(&status, s->status);
	worst(&status, s->operands.status);
	end_detour(s);
	tls_context_free(s->tls);
	source_free(&s->operands);
	list_free(&s->header.to);
	free(s);
	if (!stdout_good())
		worst(&status, EX_IOERR);
	return status;
}

/* ==== 13 listen ========================================================== */

enum {
	OVERFLOW_MAX = 64,              /* connections that are told 421 */
	DESCRIPTORS = 64,               /* for all else */
	LINGER_MS = 2000, LINGER_OCTETS = 64 << 20,
	DELAY_LINE_MAX = 64 << 20,      /* octets held by --latency, a session */
	SYN_MAX = 65535                 /* octets that a SYN may bring */
};

/* What arrived, to be acted on when it is due. */
struct arrival {
	struct arrival *next;
	int64_t due_us;
	size_t len, used;
	bool eof, early;
	char data[];
};

struct session {
	struct session *next;
	struct listener *listener;
	struct link link;               /* closed: gone, but the committer has its mail */
	size_t poll_at;                 /* its place in the listener's polls */
	struct bsmtp_server server;
	struct bsmtp_held few[BSMTP_SERVER_HELD_MIN], *many;
	struct trace trace;
	char peer[96], *helo;
	unsigned char host[16];         /* for --max-per-peer */
	struct delivery *current;
	struct arrival *first, **last;
	size_t delayed;                 /* octets in them */
	char *out;                      /* replies rendered and not yet sent */
	size_t out_len, out_sent;
	size_t pending;                 /* messages at the committer */
	uint64_t messages, octets, received, turnarounds;
	int64_t start_us, progress_us, resume_us, linger_us;
	uint64_t linger_octets;
	bool ending, lingering, answered;
	bool eof;                       /* the peer will send no more */
	bool listed, local;             /* it is on --allow's list; a local socket */
	bool securing;                  /* behind what is owed, TLS begins */
	bool opened_so;                 /* by BSMTP's opening, its octets behind it */
	bool shaking;                   /* its handshake is under way */
	bool begun;                     /* and early data has begun the dialogue */
	bool syn_data;                  /* what comes first may have come in the SYN */
	struct claim *claim;            /* a name and its password, at the verifier */
	int64_t verdict_us;             /* when its refusal is told */
	uint64_t verdict_ticket;
	enum bsmtp_answer verdict;
	bool blocked;                   /* no room for more replies: send some first */
};

/* ---- accounts ---- */

/* The lines of --users: "name:{scheme}hash".  The loop reads them anew, the verifier
 * looks at them. */
struct users {
	struct list lines;
	pthread_mutex_t lock;
	bool made;
};

/* A name and a password that somebody claims to have. */
struct claim {
	struct job job;
	struct session *session;        /* NULL: gone */
	uint64_t ticket;
	char *name, *secret;
	size_t secret_len;
	bool good;
};

/* False with a diagnostic; what was read before stays then. */
static bool users_read(struct users *u, const char *path)
{
	FILE *f = fopen(path, "r");
	struct list fresh = { NULL, 0, 0 };
	char line[1024];
	bool good = f != NULL;

	if (f == NULL)
		diag("%s: %s", path, strerror(errno));
	for (size_t n = 1; good && fgets(line, sizeof line, f) != NULL; n++) {
		struct bsmtp_slice text = trim(slice_of(line));
		char *colon;
		line[text.len + (size_t)(text.at - line)] = '\0';
		colon = strchr(text.at, ':');
		if (text.len == 0 || text.at[0] == '#')
			continue;
		good = colon != NULL && colon != text.at && password_valid(colon + 1);
		if (good)
			list_add(&fresh, text);
		else
			diag("%s: line %zu: not name:{scheme}hash (see bsmtp passwd)", path, n);
	}
	if (f != NULL)
		(void)fclose(f);
	if (!good) {
		list_free(&fresh);
		return false;
	}
	if (!u->made)
		pthread_mutex_init(&u->lock, NULL);
	u->made = true;
	pthread_mutex_lock(&u->lock);
	list_free(&u->lines);
	u->lines = fresh;
	pthread_mutex_unlock(&u->lock);
	return true;
}

static void users_free(struct users *u)
{
	list_free(&u->lines);
	if (u->made)
		pthread_mutex_destroy(&u->lock);
}

/* The hash of a name's password; of an unknown name some other's, so that both take
 * the same time. */
static char *users_find(struct users *u, const char *name, bool *known)
{
	char *hash = NULL;
	size_t n = strlen(name);

	*known = false;
	pthread_mutex_lock(&u->lock);
	for (size_t i = 0; i < u->lines.count && !*known; i++) {
		const char *line = u->lines.items[i];
		*known = strncmp(line, name, n) == 0 && line[n] == ':';
		if (i == 0 || *known) {
			free(hash);
			hash = copy_slice(slice_of(strchr(line, ':') + 1));
		}
	}
	pthread_mutex_unlock(&u->lock);
	return hash;
}

/* The verifier's work: a hash takes some 50 ms, which nobody else shall wait for. */
static void verify(void *context, struct job *group)
{
	struct users *u = context;

	for (struct job *job = group; job != NULL; job = job->next) {
		struct claim *c = (struct claim *)(void *)job;
		bool known;
		char *hash = users_find(u, c->name, &known);
		c->good = hash != NULL && password_matches(hash, c->secret, c->secret_len) && known;
		free(hash);
	}
}

struct listener {
	struct store store;
	struct worker committer;
	struct worker verifier;         /* of passwords, whose hashes take their time */
	struct users users;
	struct tls_context *tls;
	struct bsmtp_server_config config;
	struct pollfd *polls;
	size_t poll_room;
	int sockets[16];
	size_t socket_count;
	struct list unlink_paths;
	struct session *sessions;
	size_t session_count, pending, group_max;
	uint64_t stored;
	int64_t start_us, stop_us;
	int signal_pipe[2];
	int stdio_flags[2];             /* of descriptors 0 and 1, before us */
	int last_error;
	bool stopping, at_once, late, first_ended;
	bool accept_failed;             /* and is not tried again for a moment */
	bool accept_told;
	char in[IN_SIZE];
	char out[REPLY_SIZE];
};

/* The write end of the pipe that wakes the loop. */
static volatile sig_atomic_t signal_fd = -1;

static void on_signal(int number)
{
	char octet = (char)number;
	int saved = errno;

	(void)!write(signal_fd, &octet, 1);
	errno = saved;
}

static bool session_flush(struct session *s);
static void linger(struct session *s);
static size_t session_work(struct session *s, const char *in, size_t len);
static void session_secure(struct session *s);
static void session_take(struct session *s, const char *in, size_t len, bool early);
static void claim_new(struct session *s, const struct bsmtp_server_event *e);

static bool is_open(const struct session *s)
{
	return s->link.in >= 0;
}

/* ---- sessions: the store's side ---- */

/* Where the message is now, or "" where it is nowhere. */
static void name_stored(const struct store *st, const struct delivery *d, char *path, size_t size)
{
	bool files = st->row->layout == LAYOUT_FILES, appended = st->row->layout == LAYOUT_APPENDED;

	path[0] = '\0';
	if (d->answer == BSMTP_ANSWER_DUPLICATE)
		return;                 /* nobody remembers where */
	if (files)
		snprintf(path, size, "%s/%s%s", st->path, st->new_dir != st->dir ? "new/" : "", d->name);
	else if (appended)
		snprintf(path, size, "%s", st->path);
}

static void report_stored(struct session *s, struct delivery *d)
{
	struct listener *l = s->listener;
	const struct list *to = d->to.count > 0 ? &d->to : &d->known;
	char path[PATH_MAX];

	if (!options.json)
		return;
	name_stored(&l->store, d, path, sizeof path);
	json_begin(stdout, "message", l->start_us);
	printf(",\"n\":%llu", (unsigned long long)l->stored);
	json_key(stdout, "peer", slice_of(d->peer));
	printf(",\"protocol\":\"%s\"", d->protocol);
	json_version(stdout, &s->link);
	json_key(stdout, "helo", slice_of(d->helo));
	json_key(stdout, "from", slice_of(d->from));
	fputs(",\"to\":[", stdout);
	for (size_t i = 0; i < to->count; i++) {
		fputs(i > 0 ? "," : "", stdout);
		json_string(stdout, slice_of(to->items[i]));
	}
	printf("],\"octets\":%llu", (unsigned long long)d->octets);
	json_text_or_null(stdout, "transid", d->transid);
	printf(",\"duplicate\":%s,\"file\":", d->answer == BSMTP_ANSWER_DUPLICATE ? "true" : "false");
	if (path[0] != '\0')
		json_string(stdout, slice_of(path));
	else
		fputs("null", stdout);
	fputs("}\n", stdout);
}

/* What the sender is told: of a failed store by errno. */
static enum bsmtp_answer answer_for(const struct delivery *d)
{
	if (d->error == ENOSPC || d->error == EDQUOT || d->error == EFBIG)
		return BSMTP_ANSWER_NO_SPACE;
	return d->error != 0 ? BSMTP_ANSWER_STORE_FAILED : d->answer;
}

/* The store is done with a message, or never had to do with it. */
static void delivered(struct delivery *d)
{
	struct session *s = d->session;
	struct listener *l = s->listener;
	enum bsmtp_answer answer = answer_for(d);

	if (answer == BSMTP_ANSWER_STORED) {
		l->stored++;
		s->messages++;
		s->octets += d->octets;
		if (d->transid != NULL && l->store.journal.path[0] == '\0')
			ids_add_all(&l->store.ids, d, (int64_t)time(NULL));
	} else if (d->error != 0 && d->error != l->last_error) {
		diag("%s: %s", l->store.path, strerror(d->error));
	}
	l->last_error = d->error;
	if (answer == BSMTP_ANSWER_STORED || answer == BSMTP_ANSWER_DUPLICATE)
		report_stored(s, d);
	if (is_open(s))
		bsmtp_server_settle(&s->server, d->ticket, answer);
	delivery_free(&l->store, d);
	if (s->current != NULL && s->current->waits)
		ids_claim(&l->store.ids, s->current);
}

/* With --count, MAIL is refused as soon as the last message wanted is whole,
 * and taken again if it could not be stored. */
static void enough(struct listener *l)
{
	l->config.stopping = l->stop_us != 0 ||
	    (options.count > 0 && l->stored + l->pending >= options.count);
}

/* A message is whole; one that every recipient has already had no text. */
static void message_whole(struct session *s, const struct bsmtp_server_event *e)
{
	struct delivery *d = s->current;
	struct listener *l = s->listener;

	s->current = NULL;
	d->ticket = e->ticket;
	if (d->to.count == 0)
		d->octets = e->number;
	if (d->to.count == 0 && d->answer == BSMTP_ANSWER_STORED)
		d->answer = BSMTP_ANSWER_DUPLICATE;
	if (!delivery_end(&l->store, d)) {
		delivered(d);
		enough(l);
		return;
	}
	s->pending++;
	l->pending++;
	if (l->store.row->layout == LAYOUT_COMMAND)
		pool_give(&l->store.pool, d);
	else
		worker_give(&l->committer, &d->job);
	enough(l);
}

static void message_begin(struct session *s, const struct bsmtp_server_event *e)
{
	struct delivery *d = grow(NULL, sizeof *d);
	enum bsmtp_verb hello = bsmtp_server_hello(&s->server);

	memset(d, 0, sizeof *d);
	d->fd = d->side = -1;
	d->session = s;
	d->from = copy_slice(e->text);
	d->peer = copy_slice(slice_of(s->peer));
	d->helo = copy_slice(slice_of(s->helo != NULL ? s->helo : "unknown"));
	d->protocol = hello == BSMTP_VERB_BSMTP ? "BSMTP" : hello == BSMTP_VERB_EHLO ? "ESMTP" : "SMTP";
	d->utf8 = e->utf8;
	if (e->transid.len > 0) {
		d->transid = copy_slice(e->transid);
		d->id = ids_name(&s->listener->store.ids, e->transid, slice("", 0));
		ids_claim(&s->listener->store.ids, d);
	}
	s->current = d;
}

/* Octets of recipients that one command gets: Linux takes no variable of 128 KiB. */
enum { RECIPIENTS_MAX = 100 << 10 };

static bool fits_command(const struct delivery *d, struct bsmtp_slice mailbox)
{
	size_t len = mailbox.len;

	for (size_t i = 0; d != NULL && i < d->to.count; i++)
		len += strlen(d->to.items[i]) + 1;
	return len <= RECIPIENTS_MAX;
}

/* The engine asks about a recipient. */
static enum bsmtp_answer judge_recipient(void *context, struct bsmtp_slice mailbox)
{
	struct session *s = context;
	struct store *st = &s->listener->store;
	const struct delivery *d = s->current;

	if (d != NULL && d->transid != NULL && ids_has(&st->ids, slice_of(d->transid), mailbox))
		return BSMTP_ANSWER_DUPLICATE;
	/* A command would take it for an option; our own relay says where options end. */
	if (st->row->layout == LAYOUT_COMMAND && options.called == NULL && mailbox.len > 0 && mailbox.at[0] == '-')
		return BSMTP_ANSWER_DASH;
	return st->row->layout != LAYOUT_COMMAND || fits_command(d, mailbox) ? BSMTP_ANSWER_STORED :
	    BSMTP_ANSWER_TOO_MANY;
}

static void message_rcpt(struct delivery *d, const struct bsmtp_server_event *e)
{
	if (!e->known)
		list_add(&d->to, e->text);
	else if (d->known.count < options.max_recipients && !list_has(&d->known, e->text))
		list_add(&d->known, e->text);
}

/* ---- sessions: the peer's side ---- */

static void session_gone(struct session *s)
{
	struct bsmtp_server_event e;

	if (!is_open(s))
		return;
	bsmtp_server_eof(&s->server, &e);
	delivery_forget(&s->listener->store, s->current);
	s->current = NULL;
	if (s->claim != NULL)
		s->claim->session = NULL;
	s->claim = NULL;
	link_close(&s->link);
	s->listener->session_count--;
	s->listener->first_ended = true;
	while (s->first != NULL) {
		struct arrival *a = s->first;
		s->first = a->next;
		free(a);
	}
	s->last = &s->first;
	trace_note(&s->trace, "end: %s", bsmtp_end_name(bsmtp_server_end(&s->server)));
	if (options.json) {
		json_begin(stdout, "session", s->listener->start_us);
		json_key(stdout, "peer", slice_of(s->peer));
		printf(",\"messages\":%llu,\"octets\":%llu,\"seconds\":%.3f,\"end\":\"%s\","
		    "\"turnarounds\":%llu}\n", (unsigned long long)s->messages,
		    (unsigned long long)s->octets, (double)(now_us() - s->start_us) / 1e6,
		    bsmtp_end_name(bsmtp_server_end(&s->server)), (unsigned long long)s->turnarounds);
	}
}

/* ---- sessions: TLS ---- */

/* What is known of the peer: who is on the list, or has shown a certificate. */
static unsigned peer_flags(const struct session *s)
{
	bool certified = options.client_ca != NULL && link_peer_certified(&s->link);

	return (s->listed || certified ? BSMTP_PEER_ALLOWED : 0u) |
	    (options.client_ca != NULL || options.users != NULL ? BSMTP_PEER_GUEST : 0u) |
	    (s->local ? BSMTP_PEER_LOCAL : 0u);
}

/* The dialogue begins under TLS, which the engine has not seen begin. */
static void session_begin(struct session *s, unsigned more)
{
	bsmtp_server_init(&s->server, &s->listener->config, peer_flags(s) | BSMTP_PEER_TLS | more,
	    s->few, COUNT(s->few));
	s->server.tap_context = &s->trace;
	s->server.judge_context = s;
	s->trace.tls = s->begun = true;
}

/* Reads early data as far as it has come; whether the handshake can go on. */
static bool session_early(struct session *s)
{
	struct listener *l = s->listener;
	ssize_t n;

	while ((n = link_read_early(&s->link, l->in, sizeof l->in)) > 0) {
		if (!s->begun)
			session_begin(s, BSMTP_PEER_EARLY);
		session_take(s, l->in, (size_t)n, true);
		if (!is_open(s))
			return false;
	}
	if (n == 0 && s->begun)
		(void)session_flush(s);         /* with our part of the handshake */
	return n != LINK_AGAIN && is_open(s);
}

/* One step of the handshake.  Under TLS from the first octet the greeting follows it. */
static void session_shake(struct session *s)
{
	bool implicit = !s->securing;
	ssize_t n;

	if (link_early(&s->link) && !session_early(s))
		return;
	n = link_handshake(&s->link);
	if (n == LINK_AGAIN)
		return;
	if (n == LINK_FAILED) {
		trace_note(&s->trace, "TLS: %s", link_tls_why(&s->link));
		link_end_tls(&s->link);         /* its alert is to arrive */
		s->shaking = s->securing = false;
		s->ending = true;
		linger(s);
		return;
	}
	s->shaking = s->securing = s->syn_data = false;
	s->trace.tls = true;
	trace_note(&s->trace, "%s%s", or_empty(link_version(&s->link)),
	    link_resumed(&s->link) ? ", resumed" : "");
	if (!implicit)
		bsmtp_server_secured(&s->server, peer_flags(s));
	else if (!s->begun)
		session_begin(s, 0);
	bsmtp_server_early(&s->server, false);
	(void)session_work(s, "", 0);
	(void)session_flush(s);
}

static void session_accept_tls(struct session *s, struct bsmtp_slice held)
{
	/* A certificate comes after ALPN: where one is asked for, it is judged first. */
	bool may = s->listed && options.client_ca == NULL && s->listener->config.opening == BSMTP_OPENING_ACCEPT &&
	    (s->listener->config.keywords & BSMTP_KEY_BSMTP) != 0;

	s->shaking = true;
	if (link_accept_tls(&s->link, s->listener->tls, held, may))
		session_shake(s);
	else
		session_gone(s);
}

/* The reply that TLS follows is sent.  What came behind BSMTP's opening is TLS; behind
 * STARTTLS there can be nothing yet, so that what there is was slipped in. */
static void session_secure(struct session *s)
{
	char *held = grow(NULL, s->delayed + 1);
	size_t len = 0;

	while (s->first != NULL) {
		struct arrival *a = s->first;
		memcpy(held + len, a->data + a->used, a->len - a->used);
		len += a->len - a->used;
		s->first = a->next;
		free(a);
	}
	s->last = &s->first;
	s->delayed = 0;
	if (len > 0 && !s->opened_so) {
		diag("%s: octets behind STARTTLS: somebody is in between", s->peer);
		session_gone(s);
	} else {
		session_accept_tls(s, slice(held, len));
	}
	free(held);
}

/* Half-closes, so that the replies arrive, and reads on a while: closing with
 * octets unread would reset the connection and destroy them. */
static void linger(struct session *s)
{
	s->lingering = true;
	s->linger_us = now_us() + LINGER_MS * 1000;
	link_finish(&s->link);
}

/* Sends what may go.  False when the session is over. */
static bool session_flush(struct session *s)
{
	struct listener *l = s->listener;

	while (is_open(s) && !s->lingering && (!s->shaking || s->begun)) {
		bool closed = false;
		const char *out = s->out != NULL ? s->out + s->out_sent : l->out;
		size_t len = s->out != NULL ? s->out_len - s->out_sent :
		    bsmtp_server_out(&s->server, l->out, sizeof l->out, &closed);
		ssize_t n = len > 0 ? link_write(&s->link, out, len) : 0;
		if (len > 0)
			s->answered = true;
		if (n > 0)
			s->progress_us = now_us();
		if (closed || n == LINK_FAILED) {
			session_gone(s);
			return false;
		}
		if (n == LINK_AGAIN)
			n = 0;
		if (s->out != NULL) {
			s->out_sent += (size_t)n;
		} else if ((size_t)n < len) {
			s->out = grow(NULL, len - (size_t)n);
			s->out_len = len - (size_t)n;
			s->out_sent = 0;
			memcpy(s->out, out + n, s->out_len);
		}
		if (s->out != NULL && s->out_sent < s->out_len) {
			if (n == 0)
				return true;
			continue;
		}
		free(s->out);
		s->out = NULL;
		if (len == 0) {
			if (s->ending && !s->shaking && bsmtp_server_owed(&s->server) == 0)
				linger(s);
			else if (s->securing && bsmtp_server_owed(&s->server) == 0)
				session_secure(s);
			break;
		}
	}
	return is_open(s);
}

static void lend_more(struct session *s)
{
	if (s->many != NULL || (size_t)HELD_SIZE <= COUNT(s->few))
		return;
	s->many = grow(NULL, HELD_SIZE * sizeof *s->many);
	bsmtp_server_lend(&s->server, s->many, HELD_SIZE);
}

static void on_server_event(struct session *s, struct bsmtp_server_event *e)
{
	struct listener *l = s->listener;

	switch (e->type) {
	case BSMTP_SERVER_MORE:
	case BSMTP_SERVER_FULL:
		break;
	case BSMTP_SERVER_HELLO:
		free(s->helo);
		s->helo = copy_slice(e->text);
		break;
	case BSMTP_SERVER_MAIL:
		message_begin(s, e);
		break;
	case BSMTP_SERVER_RCPT:
		message_rcpt(s->current, e);
		break;
	case BSMTP_SERVER_TEXT:
		if (s->current->answer == BSMTP_ANSWER_STORED)
			delivery_text(&l->store, s->current, e->text);
		else
			s->current->octets += e->text.len;
		break;
	case BSMTP_SERVER_MESSAGE:
		message_whole(s, e);
		break;
	case BSMTP_SERVER_ABORT:
		delivery_forget(&l->store, s->current);
		s->current = NULL;
		break;
	case BSMTP_SERVER_STARTTLS:
		s->securing = true;
		s->opened_so = e->number == 1;
		break;
	case BSMTP_SERVER_AUTH:
		claim_new(s, e);
		break;
	case BSMTP_SERVER_DELAY:
		s->resume_us = now_us() + (int64_t)e->number * 1000;
		break;
	case BSMTP_SERVER_END:
		s->ending = true;
		break;
	}
}

static bool may_work(const struct session *s)
{
	return is_open(s) && !s->ending && !s->securing && (!s->shaking || s->begun) && s->resume_us == 0 &&
	    s->claim == NULL && s->verdict_us == 0 && (s->current == NULL || !s->current->waits) &&
	    s->listener->pending < s->listener->group_max && (options.cut_messages == 0 ||
	    s->messages + s->pending < options.cut_messages);
}

/* Gives octets to the engine; returns how many it used. */
static size_t session_work(struct session *s, const char *in, size_t len)
{
	size_t used = 0;
	bool idle = false;

	s->blocked = false;
	while (may_work(s) && !idle) {
		struct bsmtp_server_event e;
		used += bsmtp_server_in(&s->server, in + used, len - used, &e);
		on_server_event(s, &e);
		idle = e.type == BSMTP_SERVER_MORE;
		if (e.type == BSMTP_SERVER_FULL) {
			size_t owed = bsmtp_server_owed(&s->server);
			lend_more(s);
			if (!session_flush(s) || (bsmtp_server_owed(&s->server) == owed &&
			    (s->many == NULL || owed + 2 > HELD_SIZE))) {
				s->blocked = true;
				break;
			}
		}
	}
	return s->ending ? len : used;
}

static void keep_arrival(struct session *s, const char *in, size_t len, int64_t due, bool eof,
    bool early)
{
	struct arrival *a = grow(NULL, sizeof *a + len);

	a->next = NULL;
	a->due_us = due;
	a->len = len;
	a->used = 0;
	a->eof = eof;
	a->early = early;
	if (len > 0)
		memcpy(a->data, in, len);
	*s->last = a;
	s->last = &a->next;
	s->delayed += len;
}

static void session_eof(struct session *s)
{
	struct bsmtp_server_event e;

	bsmtp_server_eof(&s->server, &e);
	on_server_event(s, &e);
	s->ending = true;
}

/* Acts on what was kept and is due now. */
static void work_arrivals(struct session *s)
{
	int64_t now = now_us();

	while (s->first != NULL && s->first->due_us <= now && may_work(s)) {
		struct arrival *a = s->first;
		size_t used;
		bsmtp_server_early(&s->server, a->early);
		used = session_work(s, a->data + a->used, a->len - a->used);
		if (!is_open(s))        /* gone, and what was kept with it */
			return;
		a->used += used;
		s->delayed -= used;
		if (a->used < a->len || s->resume_us != 0)
			return;
		if (a->eof)
			session_eof(s);
		s->first = a->next;
		if (s->first == NULL)
			s->last = &s->first;
		free(a);
	}
}

/* Acts on what has come, or keeps it until it can or may; `early`: somebody may be
 * repeating it. */
static void session_take(struct session *s, const char *in, size_t len, bool early)
{
	size_t used = 0;

	s->progress_us = now_us();
	if (s->answered && len > 0 && s->first == NULL)
		s->turnarounds++;
	s->answered = false;
	s->eof = len == 0;
	s->received += (uint64_t)len;
	if (s->first == NULL && options.latency_ms == 0) {
		bsmtp_server_early(&s->server, early);
		used = session_work(s, in, len);
	}
	if (!is_open(s))
		return;
	if (used < len || (len == 0 && (s->first != NULL || options.latency_ms > 0)))
		keep_arrival(s, in + used, len - used, options.latency_ms > 0 ?
		    now_us() + (int64_t)options.latency_ms * 1000 : 0, len == 0, early);
	else if (len == 0)
		session_eof(s);
	if (options.cut_octets > 0 && s->received >= options.cut_octets)
		session_gone(s);
}

static void session_read(struct session *s)
{
	struct listener *l = s->listener;
	size_t most = sizeof l->in;
	ssize_t n;

	if (s->shaking) {
		s->progress_us = now_us();
		session_shake(s);
		return;
	}
	if (options.cut_octets > 0)
		most = options.cut_octets - s->received < most ?
		    (size_t)(options.cut_octets - s->received) : most;
	n = link_read(&s->link, l->in, most);
	if (n == LINK_AGAIN)
		return;
	s->progress_us = now_us();
	if (n == LINK_FAILED) {
		if (*link_tls_why(&s->link) != '\0' && !s->lingering)   /* cut off */
			trace_note(&s->trace, "TLS: %s", link_tls_why(&s->link));
		session_gone(s);
		return;
	}
	if (s->lingering) {
		s->linger_octets += (uint64_t)n;
		if (n == 0 || s->linger_octets > LINGER_OCTETS)
			session_gone(s);
		return;
	}
	session_take(s, l->in, (size_t)n, s->syn_data && s->received < SYN_MAX);
}

/* ---- who it is ---- */

enum { FAILED_US = 2000000 };   /* how long a refusal is kept back */

static void claim_new(struct session *s, const struct bsmtp_server_event *e)
{
	struct claim *c = grow(NULL, sizeof *c);

	memset(c, 0, sizeof *c);
	c->session = s;
	c->ticket = e->ticket;
	c->name = copy_slice(e->text);
	c->secret = copy_slice(e->secret);
	c->secret_len = e->secret.len;
	s->claim = c;
	worker_give(&s->listener->verifier, &c->job);
}

static void claim_free(struct claim *c)
{
	wipe(c->secret, c->secret_len);
	free(c->secret);
	free(c->name);
	free(c);
}

/* A refusal is told after a while, and keeps nobody else waiting. */
static void take_verdicts(struct listener *l)
{
	struct job *job = l->verifier.started ? worker_take(&l->verifier) : NULL, *next;

	for (; job != NULL; job = next) {
		struct claim *c = (struct claim *)(void *)job;
		struct session *s = c->session;
		next = job->next;
		if (s != NULL) {
			s->claim = NULL;
			s->verdict = c->good ? BSMTP_ANSWER_STORED : BSMTP_ANSWER_AUTH_FAILED;
			s->verdict_ticket = c->ticket;
			s->verdict_us = now_us() + (c->good ? 0 : FAILED_US);
			if (!c->good)
				diag("%s: not accepted: the user %s", s->peer, c->name);
		}
		claim_free(c);
	}
}

/* ---- accepting ---- */

static void map_host(const struct sockaddr *sa, unsigned char host[16])
{
	memset(host, 0, 16);
	if (sa->sa_family == AF_INET6) {
		memcpy(host, &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr, 16);
	} else if (sa->sa_family == AF_INET) {
		host[10] = host[11] = 0xFF;
		memcpy(host + 12, &((const struct sockaddr_in *)(const void *)sa)->sin_addr, 4);
	}
}

static bool in_cidr(const struct cidr *c, const unsigned char host[16])
{
	for (unsigned bit = 0; bit < c->bits; bit++)
		if (((c->address[bit / 8] ^ host[bit / 8]) >> (7 - bit % 8)) & 1)
			return false;
	return true;
}

/* Prearrangement: local sockets, and who was named: by address, else by certificate
 * or password later, else loopback. */
static bool is_allowed(const struct sockaddr *sa, const unsigned char host[16])
{
	static const struct cidr loopback[] = {
		{ { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 127 }, 104 },
		{ { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 }, 128 },
	};
	bool named = options.allow_count > 0 || options.client_ca != NULL || options.users != NULL;
	const struct cidr *list = named ? options.allow : loopback;
	size_t count = named ? options.allow_count : COUNT(loopback);

	if (sa->sa_family == AF_UNIX)
		return true;
	for (size_t i = 0; i < count; i++)
		if (in_cidr(&list[i], host))
			return true;
	return false;
}

static size_t sessions_of(struct listener *l, const unsigned char host[16])
{
	size_t n = 0;

	for (struct session *s = l->sessions; s != NULL; s = s->next)
		n += is_open(s) && memcmp(s->host, host, 16) == 0;
	return n;
}

static void session_new(struct listener *l, struct link link, const struct sockaddr *sa,
    socklen_t len)
{
	struct session *s = grow(NULL, sizeof *s);
	struct bsmtp_server_event e;

	memset(s, 0, sizeof *s);
	s->listener = l;
	s->link = link;
	s->last = &s->first;
	s->start_us = s->progress_us = now_us();
	if (link.in == link.out)
		name_address(s->peer, sizeof s->peer, sa, len);
	else
		snprintf(s->peer, sizeof s->peer, "stdio");
	map_host(sa, s->host);
	s->trace.start_us = l->start_us;
	s->trace.server = true;
	snprintf(s->trace.who, sizeof s->trace.who, "%.90s ", s->peer);
	s->local = sa->sa_family == AF_UNIX;
	s->listed = is_allowed(sa, s->host);
	s->syn_data = !options.tls && link_had_syn_data(&link);
	bsmtp_server_init(&s->server, &l->config, peer_flags(s), s->few, COUNT(s->few));
	s->server.tap_context = &s->trace;
	s->server.judge_context = s;
	if (l->session_count >= options.max_connections || (options.max_per_peer > 0 &&
	    sessions_of(l, s->host) >= options.max_per_peer)) {
		bsmtp_server_stop(&s->server, BSMTP_ANSWER_BUSY, &e);
		s->ending = true;
	}
	s->next = l->sessions;
	l->sessions = s;
	l->session_count++;
	trace_note(&s->trace, "connected");
	if (!s->ending && options.tls)
		session_accept_tls(s, slice("", 0));
	else if (!s->ending && options.latency_ms > 0)
		keep_arrival(s, "", 0, s->start_us + (int64_t)options.latency_ms * 1000, false, false);
	else
		(void)session_work(s, "", 0);
	(void)session_flush(s);
}

static void accept_all(struct listener *l, int socket)
{
	for (;;) {
		struct sockaddr_storage peer;
		socklen_t len = sizeof peer;
		int fd = accept(socket, (struct sockaddr *)(void *)&peer, &len);
		if (fd < 0) {
			bool full = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
			if (full && !l->accept_told)
				diag("accept: %s", strerror(errno));
			l->accept_failed = l->accept_told = full;
			return;
		}
		l->accept_told = false;
		if (!set_flags(fd) || l->session_count >= options.max_connections + (l->group_max < GROUP_MAX ? 1 : OVERFLOW_MAX))
			close(fd);
		else
			session_new(l, (struct link){ fd, fd, NULL }, (struct sockaddr *)(void *)&peer, len);
	}
}

/* One session on standard input and output: inetd's socket, or pipes as ssh has
 * them.  Who has started us has arranged it; a peer on a network is still asked
 * for. */
static void session_on_stdio(struct listener *l)
{
	struct sockaddr_storage peer;
	socklen_t len = sizeof peer;

	memset(&peer, 0, sizeof peer);
	if (getpeername(STDIN_FILENO, (struct sockaddr *)(void *)&peer, &len) != 0 ||
	    (peer.ss_family != AF_INET && peer.ss_family != AF_INET6))
		peer.ss_family = AF_UNIX;
	for (int fd = STDIN_FILENO; fd <= STDOUT_FILENO; fd++) {
		l->stdio_flags[fd] = fcntl(fd, F_GETFL);
		(void)set_flags(fd);
	}
	session_new(l, (struct link){ fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3),
	    fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3), NULL }, (struct sockaddr *)(void *)&peer, len);
}

/* Whoever shares them with us, a terminal's shell say, wants them as they were. */
static void restore_stdio(const struct listener *l)
{
	for (int fd = STDIN_FILENO; options.stdio && fd <= STDOUT_FILENO; fd++)
		(void)fcntl(fd, F_SETFL, l->stdio_flags[fd]);
}

/* ---- the addresses ---- */

/* Whether it is said who may speak. */
static bool is_arranged(void)
{
	return options.allow_count > 0 || options.client_ca != NULL || options.users != NULL;
}

static bool is_wide(const struct sockaddr *sa)
{
	unsigned char host[16];

	map_host(sa, host);
	return !is_allowed(sa, host);
}

/* A socket file whose listener is gone is in the way of a new one. */
static void remove_stale(const struct sockaddr *sa, socklen_t len, const char *path)
{
	struct stat st;
	int fd;

	if (lstat(path, &st) != 0 || !S_ISSOCK(st.st_mode))
		return;
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd >= 0 && connect(fd, sa, len) != 0 && errno == ECONNREFUSED)
		(void)unlink(path);
	if (fd >= 0)
		close(fd);
}

/* A window that is large from the start: Linux lets its own grow by what was read
 * in a round trip, less what had come and was not; one who wakes late gets little.
 * 4 MB over a line of 100 ms took 1.1 to 5.8 s, and take 1.1.  Where less is granted
 * its own is better, and only a socket that was never asked has that: hence `probe`. */
static void widen_window(int fd, int family)
{
	int want = 4 << 20, got = 0, probe = socket(family, SOCK_STREAM, 0);
	socklen_t len = sizeof got;

	if (probe < 0)
		return;
	if (setsockopt(probe, SOL_SOCKET, SO_RCVBUF, &want, sizeof want) == 0 &&
	    getsockopt(probe, SOL_SOCKET, SO_RCVBUF, &got, &len) == 0 && got >= want)
		(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &want, sizeof want);
	close(probe);
}

static bool listen_on(struct listener *l, const struct sockaddr *sa, socklen_t len)
{
	int fd, one = 1;

	errno = EMFILE;
	if (l->socket_count == COUNT(l->sockets) ||
	    (fd = socket(sa->sa_family, SOCK_STREAM, 0)) < 0)
		return false;
	(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (sa->sa_family == AF_INET6)
		(void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
	if (options.fastopen && sa->sa_family != AF_UNIX)
		hasten(fd, true);
	widen_window(fd, sa->sa_family);
	if (!set_flags(fd) || bind(fd, sa, len) != 0 || listen(fd, SOMAXCONN) != 0) {
		int saved = errno;
		close(fd);
		errno = saved;
		return false;
	}
	l->sockets[l->socket_count++] = fd;
	return true;
}

static int listen_address(struct listener *l, const char *text)
{
	struct address a;
	struct addrinfo *found = NULL;
	struct sockaddr_un un;
	size_t before = l->socket_count;
	int error;

	if (!parse_address(&a, text)) {
		diag("%s: not an address (host, host:port, [v6]:port, :port, unix:/path)", text);
		return EX_USAGE;
	}
	if (a.local) {
		socklen_t len = local_address(&un, a.host);
		remove_stale((struct sockaddr *)(void *)&un, len, a.host);
		if (listen_on(l, (struct sockaddr *)(void *)&un, len)) {
			list_add(&l->unlink_paths, slice_of(a.host));
			return EX_OK;
		}
		diag("%s: %s", text, strerror(errno));
		return EX_UNAVAILABLE;
	}
	error = resolve(&a, true, &found);
	if (error != 0) {
		diag("%s: %s", text, gai_strerror(error));
		return EX_NOHOST;
	}
	for (struct addrinfo *i = found; i != NULL; i = i->ai_next) {
		if (is_wide(i->ai_addr) && !is_arranged()) {
			diag("%s: beyond this host BSMTP is by prearrangement: give --allow CIDR or --client-ca", text);
			freeaddrinfo(found);
			return EX_USAGE;
		}
		/* A family that this host has not is no failure while another is there. */
		if (!listen_on(l, i->ai_addr, i->ai_addrlen) && (error == 0 ||
		    (errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL)))
			error = errno;
	}
	freeaddrinfo(found);
	if (l->socket_count > before && (error == 0 || error == EAFNOSUPPORT ||
	    error == EADDRNOTAVAIL))
		return EX_OK;
	diag("%s: %s", text, strerror(error));
	return EX_UNAVAILABLE;
}

/* Sockets that systemd holds for us: LISTEN_FDS of them, from descriptor 3 on. */
static int adopt_sockets(struct listener *l)
{
	const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
	uint64_t n = 0, who = 0;

	if (pid == NULL || count == NULL || parse_number(pid, &who) != NULL ||
	    parse_number(count, &n) != NULL || who != (uint64_t)getpid())
		return EX_OK;
	for (int fd = 3; n > 0; n--, fd++) {
		struct sockaddr_storage sa;
		socklen_t len = sizeof sa;
		if (l->socket_count == COUNT(l->sockets) ||
		    getsockname(fd, (struct sockaddr *)(void *)&sa, &len) != 0 || !set_flags(fd)) {
			diag("LISTEN_FDS: descriptor %d: %s", fd, strerror(errno));
			return EX_UNAVAILABLE;
		}
		if (is_wide((struct sockaddr *)(void *)&sa) && !is_arranged()) {
			diag("LISTEN_FDS: beyond this host BSMTP is by prearrangement: give --allow CIDR or --client-ca");
			return EX_USAGE;
		}
		l->sockets[l->socket_count++] = fd;
	}
	return EX_OK;
}

/* Tells a service manager, where there is one (sd_notify(3)). */
static void notify(const char *what)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un un;
	socklen_t len;
	int fd;

	if (path == NULL || (*path != '/' && *path != '@') || strlen(path) >= sizeof un.sun_path)
		return;
	(void)local_address(&un, path);
	len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
	if (*path == '@')
		un.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	if (fd >= 0)
		(void)sendto(fd, what, strlen(what), 0, (struct sockaddr *)(void *)&un, len);
	if (fd >= 0)
		close(fd);
}

/* Says where it listens, in each of the ways that scripts wait for. */
static int announce(struct listener *l)
{
	char name[128];
	struct fresh file = { .f = NULL };
	FILE *f = options.address_file != NULL ? fresh_open(&file, options.address_file, 0666) : NULL;
	bool bad = options.address_file != NULL && f == NULL;

	for (size_t i = 0; i < l->socket_count && !bad; i++) {
		struct sockaddr_storage sa;
		socklen_t len = sizeof sa;
		bad = getsockname(l->sockets[i], (struct sockaddr *)(void *)&sa, &len) != 0;
		if (bad)
			break;
		name_address(name, sizeof name, (struct sockaddr *)(void *)&sa, len);
		if (f != NULL)
			fprintf(f, "%s\n", name);
		if (options.json) {
			printf("{\"event\":\"listening\",\"time\":%.3f,\"address\":",
			    (double)(now_us() - l->start_us) / 1e6);
			json_string(stdout, slice_of(name));
			puts("}");
		}
		if (options.trace)
			fprintf(stderr, "%10.3f === listening on %s\n",
			    (double)(now_us() - l->start_us) / 1e3, name);
	}
	fflush(stdout);
	if (f != NULL)
		bad = !fresh_keep(&file, !bad);
	if (bad)
		diag("%s: %s", or_empty(options.address_file), strerror(errno));
	return bad ? EX_CANTCREAT : EX_OK;
}

/* ---- the loop ---- */

static void stop_listening(struct listener *l)
{
	for (size_t i = 0; i < l->socket_count; i++)
		close(l->sockets[i]);
	l->socket_count = 0;
	for (size_t i = 0; i < l->unlink_paths.count; i++)
		(void)unlink(l->unlink_paths.items[i]);
	if (l->stop_us == 0) {
		l->stop_us = now_us();
		notify("STOPPING=1");
	}
	l->config.stopping = true;
}

static void session_stop(struct session *s, enum bsmtp_answer answer)
{
	struct bsmtp_server_event e;

	if (!is_open(s) || s->ending)
		return;
	if (s->shaking || s->securing) {
		session_gone(s);
		return;
	}
	bsmtp_server_stop(&s->server, answer, &e);
	on_server_event(s, &e);
	s->ending = true;
	(void)session_flush(s);
}

/* Then the peer is not silent, unless it does not read what it was told. */
static bool we_are_at_work(const struct session *s)
{
	return s->claim != NULL || s->verdict_us != 0 ||
	    ((s->pending > 0 || s->first != NULL || s->resume_us != 0) && s->out == NULL);
}

/* What time has brought: delays that are over, silence, the end of lingering. */
static void session_time(struct session *s, int64_t now)
{
	int64_t silence = (int64_t)options.timeout_ms * 1000;

	if (we_are_at_work(s))
		s->progress_us = now;
	if (s->resume_us != 0 && now >= s->resume_us) {
		s->resume_us = 0;
		(void)session_work(s, "", 0);
		if (!is_open(s))
			return;
	}
	if (s->lingering) {
		if (now >= s->linger_us)
			session_gone(s);
		return;
	}
	if (s->verdict_us != 0 && now >= s->verdict_us) {
		s->verdict_us = 0;
		bsmtp_server_settle(&s->server, s->verdict_ticket, s->verdict);
		(void)session_work(s, "", 0);
		if (!is_open(s))
			return;
	}
	if (s->listener->stop_us != 0 && silence > 2000000)
		silence = 2000000;
	if (now - s->progress_us < silence)
		return;
	if (s->out != NULL || s->ending || s->shaking || s->securing)
		session_gone(s);
	else
		session_stop(s, s->listener->stop_us != 0 ? BSMTP_ANSWER_STOPPING :
		    BSMTP_ANSWER_TIMEOUT);
}

static void session_serve(struct session *s, int64_t now)
{
	session_time(s, now);
	if (!is_open(s))
		return;
	work_arrivals(s);
	if (options.cut_messages > 0 && s->messages >= options.cut_messages) {
		session_gone(s);
		return;
	}
	if (session_flush(s) && s->many != NULL && bsmtp_server_owed(&s->server) == 0) {
		bsmtp_server_lend(&s->server, s->few, COUNT(s->few));
		free(s->many);
		s->many = NULL;
	}
}

/* Whether octets of the peer are wanted now. */
static bool wants_input(const struct session *s)
{
	if (s->lingering || s->shaking)
		return true;
	if (s->securing || s->ending || s->eof || s->out != NULL || s->listener->pending >= s->listener->group_max)
		return false;
	return options.latency_ms > 0 ? s->delayed < DELAY_LINE_MAX :
	    s->first == NULL && s->resume_us == 0;
}

/* The earliest moment at which this session needs the loop. */
static int64_t session_alarm(const struct session *s)
{
	int64_t silence = (int64_t)options.timeout_ms * 1000;
	int64_t at = s->lingering ? s->linger_us : s->progress_us +
	    (s->listener->stop_us != 0 && silence > 2000000 ? 2000000 : silence);

	if (s->resume_us != 0 && s->resume_us < at)
		at = s->resume_us;
	if (s->verdict_us != 0 && s->verdict_us < at)
		at = s->verdict_us;
	if (link_pending(&s->link) && wants_input(s))
		at = 0;
	if (s->first != NULL && may_work(s) && !s->blocked && s->first->due_us < at && !s->lingering)
		at = s->first->due_us;
	return at;
}

static void reap(struct listener *l)
{
	for (struct session **at = &l->sessions; *at != NULL;) {
		struct session *s = *at;
		if (is_open(s) || s->pending > 0) {
			at = &s->next;
			continue;
		}
		*at = s->next;
		free(s->many);
		free(s->out);
		free(s->helo);
		free(s);
	}
}

/* The committer, or a command, is done with these. */
static void take_done(struct listener *l, struct job *job)
{
	int64_t now = now_us();

	for (struct job *next; job != NULL; job = next) {
		struct delivery *d = (struct delivery *)(void *)job;
		next = job->next;
		if (we_are_at_work(d->session))         /* until now */
			d->session->progress_us = now;
		d->session->pending--;
		l->pending--;
		delivered(d);
	}
}

static void take_committed(struct listener *l)
{
	take_done(l, worker_take(&l->committer));
}

/* Commands that have ended; what they have taken is noted first, where ids are kept. */
static void take_commands(struct listener *l)
{
	for (struct job *job = pool_take(&l->store.pool), *next; job != NULL; job = next) {
		struct delivery *d = (struct delivery *)(void *)job;
		next = job->next;
		job->next = NULL;
		if (is_due(d) && d->transid != NULL)
			worker_give(&l->committer, job);
		else
			take_done(l, job);
	}
}

/* Fills in what is waited for, one place or two; returns how many. */
static size_t poll_session(const struct session *s, struct pollfd *p)
{
	bool one = s->link.in == s->link.out;

	p[0] = (struct pollfd){ s->link.in, link_events(&s->link, wants_input(s), one && s->out != NULL), 0 };
	if (p[0].events == 0)           /* else a hang-up would wake us for ever */
		p[0].fd = -1;
	if (!one)
		p[1] = (struct pollfd){ s->out != NULL ? s->link.out : -1, POLLOUT, 0 };
	return one ? 1 : 2;
}

static int64_t deadline_us(const struct listener *l)
{
	return l->start_us + (int64_t)options.deadline_ms * 1000;
}

static void wait_for_events(struct listener *l)
{
	size_t fixed = 3 + l->socket_count, n = fixed;
	int64_t now = now_us(), alarm = now + 3600000000;
	struct pollfd *p;

	if (l->poll_room < fixed + 2 * l->session_count) {
		l->poll_room = (fixed + l->session_count) * 4;
		l->polls = grow(l->polls, l->poll_room * sizeof *l->polls);
	}
	p = l->polls;
	p[0] = (struct pollfd){ l->signal_pipe[0], POLLIN, 0 };
	p[1] = (struct pollfd){ l->committer.signal[0], POLLIN, 0 };
	p[2] = (struct pollfd){ l->verifier.started ? l->verifier.signal[0] : -1, POLLIN, 0 };
	for (size_t i = 0; i < l->socket_count; i++)
		p[3 + i] = (struct pollfd){ l->accept_failed ? -1 : l->sockets[i], POLLIN, 0 };
	for (struct session *s = l->sessions; s != NULL; s = s->next) {
		int64_t at;
		if (!is_open(s))
			continue;
		at = session_alarm(s);
		alarm = at < alarm ? at : alarm;
		s->poll_at = n;
		n += poll_session(s, p + n);
	}
	if (options.deadline_given && !l->late && deadline_us(l) < alarm)
		alarm = deadline_us(l);
	if (l->accept_failed && now + 100000 < alarm)
		alarm = now + 100000;
	alarm = pool_alarm(&l->store.pool, alarm);
	if (poll(p, (nfds_t)n, alarm <= now ? 0 : (int)((alarm - now + 999) / 1000)) < 0)
		for (size_t i = 0; i < n; i++)
			p[i].revents = 0;
	l->accept_failed = false;
}

/* Certificates and accounts are read again; what cannot be read leaves the old ones. */
static void reload(struct listener *l)
{
	struct tls_context *fresh = l->tls != NULL && options.cert != NULL ? tls_server_context() : NULL;

	if (fresh != NULL) {
		tls_context_free(l->tls);
		l->tls = fresh;
	}
	if (options.users != NULL)
		(void)users_read(&l->users, options.users);
}

static void stop_sessions(struct listener *l)
{
	stop_listening(l);
	for (struct session *s = l->sessions; s != NULL; s = s->next)
		session_stop(s, BSMTP_ANSWER_STOPPING);
}

static void on_stop_signals(struct listener *l)
{
	char octets[16];
	ssize_t n = read(l->signal_pipe[0], octets, sizeof octets);

	for (ssize_t i = 0; i < n; i++) {
		if (octets[i] == SIGCHLD)
			continue;               /* take_commands() looks */
		if (octets[i] == SIGHUP) {
			reload(l);
			continue;
		}
		l->at_once = l->stopping;
		l->stopping = true;
	}
	if (!l->stopping)
		return;
	stop_sessions(l);
}

static void one_round(struct listener *l)
{
	size_t sockets = l->socket_count;
	int64_t now;

	wait_for_events(l);
	take_committed(l);
	take_commands(l);
	take_verdicts(l);
	for (struct session *s = l->sessions; s != NULL; s = s->next) {
		int got = is_open(s) ? l->polls[s->poll_at].revents : 0;
		/* TLS may have to write before it can read, and may hold octets back. */
		if (s->link.tls != NULL && (got != 0 || link_pending(&s->link)) && wants_input(s))
			session_read(s);
		else if ((got & (POLLIN | POLLHUP | POLLERR)) != 0 && wants_input(s))
			session_read(s);
		else if ((got & (POLLHUP | POLLERR)) != 0)      /* nobody reads the replies */
			session_gone(s);
	}
	now = now_us();
	for (struct session *s = l->sessions; s != NULL; s = s->next)
		if (is_open(s))
			session_serve(s, now);
	pool_start(&l->store);
	for (size_t i = 0; i < sockets; i++)
		if (l->polls[3 + i].revents & POLLIN)
			accept_all(l, l->sockets[i]);
	if (l->polls[0].revents & POLLIN)
		on_stop_signals(l);
	reap(l);
	if (options.json)
		fflush(stdout);
}

static bool goal_reached(const struct listener *l)
{
	return (options.count > 0 && l->stored >= options.count) ||
	    ((options.once || options.stdio) && l->first_ended);
}

static int serve(struct listener *l)
{
	int status = EX_OK;

	while (!l->at_once && (l->stop_us == 0 || l->sessions != NULL)) {
		one_round(l);
		enough(l);
		if (l->stop_us == 0 && goal_reached(l))
			stop_listening(l);
		if (!l->late && options.deadline_given && now_us() >= deadline_us(l)) {
			l->late = true;
			if ((options.count > 0 || options.once) && !goal_reached(l)) {
				diag("the deadline passed: %llu messages stored",
				    (unsigned long long)l->stored);
				status = EX_TEMPFAIL;
			}
			stop_sessions(l);
		}
	}
	return status;
}

/* A descriptor for each connection, and two for each message on its way to the
 * disk.  Where there are fewer, half of them go to either. */
static void raise_limits(struct listener *l)
{
	uint64_t need = options.max_connections + 2 * GROUP_MAX + OVERFLOW_MAX + DESCRIPTORS, have;
	struct rlimit limit;

	l->group_max = GROUP_MAX;
	if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= (rlim_t)need)
		return;
	have = limit.rlim_max < (rlim_t)need ? (uint64_t)limit.rlim_max : need;
	limit.rlim_cur = (rlim_t)need;
	limit.rlim_max = limit.rlim_max < (rlim_t)need ? (rlim_t)need : limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) == 0)
		return;
	limit.rlim_cur = limit.rlim_max = (rlim_t)have;
	(void)setrlimit(RLIMIT_NOFILE, &limit);
	have = have > DESCRIPTORS / 2 + 8 ? have - DESCRIPTORS / 2 : 8;
	l->group_max = min_size((size_t)have / 4 + 1, GROUP_MAX);
	if (options.max_connections > have - 2 * l->group_max)
		options.max_connections = have - 2 * l->group_max;
	diag("only %llu descriptors may be open: at most %llu connections",
	    (unsigned long long)limit.rlim_max, (unsigned long long)options.max_connections);
}

static int start_listening(struct listener *l)
{
	int status = EX_OK;

	if (store_open(&l->store, (enum store_kind)options.store, options.store_path) != 0) {
		diag("%s: %s", options.store_path, strerror(errno));
		return EX_CANTCREAT;
	}
	if (!options.stdio)
		status = adopt_sockets(l);
	for (size_t i = 0; i < options.operands.count && status == EX_OK; i++)
		status = listen_address(l, options.operands.items[i]);
	if (options.operands.count == 0 && l->socket_count == 0 && !options.stdio && status == EX_OK)
		status = listen_address(l, "localhost:2525");
	if (status == EX_OK)
		status = announce(l);
	if (status == EX_OK)
		notify("READY=1");
	if (options.stdio && status == EX_OK)
		session_on_stdio(l);
	return status;
}

static bool catch_signals(struct listener *l)
{
	struct sigaction act;

	memset(&act, 0, sizeof act);
	if (!make_pipe(l->signal_pipe))
		return false;
	signal_fd = l->signal_pipe[1];
	act.sa_handler = on_signal;
	act.sa_flags = SA_RESTART;      /* half a line of JSON would be lost */
	if (sigaction(SIGTERM, &act, NULL) != 0 || sigaction(SIGINT, &act, NULL) != 0 ||
	    ((l->tls != NULL || options.users != NULL) && sigaction(SIGHUP, &act, NULL) != 0))
		return false;
	act.sa_flags = SA_RESTART | SA_NOCLDSTOP;
	return options.store != STORE_EXEC || sigaction(SIGCHLD, &act, NULL) == 0;
}

static void listener_free(struct listener *l)
{
	while (l->sessions != NULL) {
		for (struct session *s = l->sessions; s != NULL; s = s->next)
			session_gone(s);
		take_done(l, pool_stop(&l->store.pool));
		take_committed(l);
		reap(l);
		if (l->sessions != NULL)
			(void)poll(&(struct pollfd){ l->committer.signal[0], POLLIN, 0 }, 1, 1000);
	}
	worker_stop(&l->committer);
	worker_stop(&l->verifier);
	users_free(&l->users);
	tls_context_free(l->tls);
	stop_listening(l);
	list_free(&l->unlink_paths);
	free(l->polls);
	store_close(&l->store);
	free(l);
}

/* TLS where it is asked for; a certificate that was made is told by its pin. */
static int prepare_tls(struct listener *l)
{
	if (options.users != NULL && !users_read(&l->users, options.users))
		return EX_NOINPUT;
	if (!options.tls && !options.starttls)
		return EX_OK;
	l->tls = tls_server_context();
	if (l->tls == NULL)
		return EX_NOINPUT;
	if (l->tls->own_pin[0] != '\0')
		diag("a certificate was made for this run: --pin sha256:%s", l->tls->own_pin);
	return EX_OK;
}

/* Whoever lists BSMTP remembers ids: a command has no place for them unless it is told. */
static unsigned kept_keywords(void)
{
	bool kept = options.store != STORE_EXEC || options.transids != NULL;

	return options.keywords & ~(kept ? 0u : (unsigned)BSMTP_KEY_BSMTP);
}

static int listen_main(void)
{
	struct listener *l = grow(NULL, sizeof *l);
	int status;

	memset(l, 0, sizeof *l);
	l->start_us = now_us();
	store_init(&l->store);
	l->config = (struct bsmtp_server_config){
		.hostname = options.hostname != NULL ? options.hostname : host_name(),
		.max_size = options.max_size,
		.max_recipients = (unsigned)options.max_recipients,
		.keywords = kept_keywords(),
		.opening = (enum bsmtp_opening)options.opening,
		.no_smtp = options.no_smtp,
		.starttls = options.starttls,
		.require_tls = options.require_tls,
		.auth = options.users != NULL,
		.normalize = options.normalize,
		.faults = options.faults,
		.fault_count = options.fault_count,
		.judge = judge_recipient,
		.tap = options.trace ? trace_tap : NULL,
	};
	raise_limits(l);
	status = prepare_tls(l);
	if (status != EX_OK) {
		;
	} else if (!catch_signals(l) || !worker_start(&l->committer, commit, commit_rest, &l->store) ||
	    (options.users != NULL && !worker_start(&l->verifier, verify, NULL, &l->users))) {
		diag("%s", strerror(errno));
		status = EX_OSERR;
	} else {
		status = start_listening(l);
		if (status == EX_OK) {
			status = serve(l);
			restore_stdio(l);
		}
	}
	listener_free(l);
	if (!stdout_good() && status == EX_OK)
		status = EX_IOERR;
	return status;
}

/* ==== 14 options ========================================================= */

enum program { SEND = 1, LISTEN = 2, BOTH = 3 };

/* One option: where it goes is known by its parser; usage, environment and
 * getopt_long() are made from the same row. */
struct option_row {
	enum program program;
	char letter;            /* 0: none */
	const char *name, *argument, *help;
	const char *(*parse)(const char *text, void *where);
	void *where;
};

static const char *parse_flag(const char *text, void *where)
{
	(void)text;
	*(bool *)where = true;
	return NULL;
}

static const char *parse_text(const char *text, void *where)
{
	free(*(char **)where);
	*(char **)where = copy_slice(slice_of(text));
	return NULL;
}

/* A number with one of these units behind it. */
static const char *parse_scaled(const char *text, uint64_t *out, const char *const *units,
    const uint64_t *scales, size_t count, uint64_t bare, uint64_t most)
{
	struct bsmtp_slice s = slice_of(text);
	uint64_t n = 0, scale = bare;
	ptrdiff_t used = bsmtp_number_parse(&n, s.at, s.len);

	if (used <= 0)
		return "not a number";
	s = slice(s.at + used, s.len - (size_t)used);
	if (s.len > 0) {
		size_t i = 0;
		while (i < count && !same(s, units[i]))
			i++;
		if (i == count)
			return "not a whole number with a unit, such as 300ms or 2k";
		scale = scales[i];
	}
	if (n > most / scale)
		return "too large";
	*out = n * scale;
	return NULL;
}

static const char *parse_time(const char *text, void *where)
{
	static const char *const units[] = { "ms", "s", "m", "h", "d" };
	static const uint64_t scales[] = { 1, 1000, 60000, 3600000, 86400000 };

	return parse_scaled(text, where, units, scales, COUNT(units), 1000, 3653 * UINT64_C(86400000));
}

static const char *parse_size(const char *text, void *where)
{
	static const char *const units[] = { "k", "m", "g" };
	static const uint64_t scales[] = { 1 << 10, 1 << 20, 1 << 30 };

	return parse_scaled(text, where, units, scales, COUNT(units), 1, INT64_MAX / 2);
}

static const char *parse_number(const char *text, void *where)
{
	return parse_scaled(text, where, NULL, NULL, 0, 1, INT64_MAX / 2);
}

static const char *parse_positive(const char *text, void *where)
{
	const char *wrong = parse_number(text, where);

	return wrong != NULL ? wrong : *(uint64_t *)where == 0 ? "it must be 1 or more" : NULL;
}

static const char *parse_some(const char *text, void *where)
{
	const char *wrong = parse_positive(text, where);

	return wrong != NULL ? wrong : *(uint64_t *)where > 1000000 ? "at most 1000000" : NULL;
}

/* The index of a word that `name` gives for 0, 1, …; the sum is count. */
static const char *parse_word(const char *text, unsigned *where, unsigned count,
    const char *(*name)(unsigned))
{
	for (unsigned i = 0; i < count; i++)
		if (strcmp(text, name(i)) == 0) {
			*where = i;
			return NULL;
		}
	return "the word is not known";
}

static const char *mode_word(unsigned i) { return bsmtp_mode_name((enum bsmtp_mode)i); }
static const char *framing_word(unsigned i) { return bsmtp_framing_name((enum bsmtp_framing)i); }
static const char *progress_word(unsigned i)
{
	static const char *const words[] = { "auto", "always", "never" };
	return words[i];
}

static const char *parse_progress(const char *text, void *where)
{
	return parse_word(text, where, PROGRESS_WHENS, progress_word);
}

static const char *opening_word(unsigned i) { return bsmtp_opening_name((enum bsmtp_opening)i); }

static const char *format_word(unsigned i)
{
	return formats[i].name;
}

static const char *parse_mode(const char *text, void *where)
{
	if (strcmp(text, "auto") == 0) {
		*(unsigned *)where = BSMTP_MODES;
		return NULL;
	}
	return parse_word(text, where, BSMTP_MODES, mode_word);
}

static const char *parse_fallback(const char *text, void *where)
{
	if (strcmp(text, "bsmtp") == 0)
		return "that is what was refused";
	return parse_word(text, where, BSMTP_MODES, mode_word);
}

static const char *parse_framing(const char *text, void *where)
{
	return parse_word(text, where, BSMTP_FRAMINGS, framing_word);
}

static const char *parse_opening(const char *text, void *where)
{
	return parse_word(text, where, BSMTP_OPENINGS, opening_word);
}

static const char *parse_format(const char *text, void *where)
{
	return parse_word(text, where, FORMAT_RAW + 1, format_word);
}

/* Two words for a switch: the second sets it. */
static const char *parse_switch(const char *text, void *where, const char *off, const char *on)
{
	*(bool *)where = strcmp(text, on) == 0;
	return strcmp(text, on) == 0 || strcmp(text, off) == 0 ? NULL : "the word is not known";
}

static const char *parse_variant(const char *text, void *where)
{
	return parse_switch(text, where, "rd", "o");
}

static const char *parse_smtp(const char *text, void *where)
{
	return parse_switch(text, where, "allow", "deny");
}

static const char *parse_newlines(const char *text, void *where)
{
	return parse_switch(text, where, "reject", "normalize");
}

static const char *parse_grace(const char *text, void *where)
{
	options.grace_given = true;
	return parse_time(text, where);
}

static const char *parse_timeout(const char *text, void *where)
{
	options.timeout_given = true;
	return parse_time(text, where);
}

static const char *parse_deadline(const char *text, void *where)
{
	options.deadline_given = true;
	return parse_time(text, where);
}

static const char *parse_from(const char *text, void *where)
{
	struct bsmtp_slice s = trim(slice_of(text));

	if (s.len >= 2 && s.at[0] == '<' && s.at[s.len - 1] == '>')
		s = slice(s.at + 1, s.len - 2);
	if (s.len > 0 && !bsmtp_mailbox_valid(s, true))
		return "not a mailbox (local-part@domain, or <>)";
	free(*(char **)where);
	*(char **)where = copy_slice(s);
	return NULL;
}

static const char *parse_to(const char *text, void *where)
{
	struct bsmtp_slice rest = slice_of(text);
	char address[BSMTP_MAILBOX_MAX];
	size_t len, before = ((struct list *)where)->count;
	int found;

	while ((found = bsmtp_address_next(&rest, address, &len)) == 1) {
		if (!bsmtp_mailbox_valid(slice(address, len), true))
			return "not a mailbox (local-part@domain)";
		list_add(where, slice(address, len));
	}
	return found < 0 || ((struct list *)where)->count == before ?
	    "not a mailbox (local-part@domain)" : NULL;
}

static const char *parse_domain(const char *text, void *where)
{
	return bsmtp_domain_valid(slice_of(text), false) ? parse_text(text, where) :
	    "not a domain or address literal";
}

static const char *parse_cidr(const char *text, void *where)
{
	const char *bar = strchr(text, '/');
	char *host = copy_slice(slice(text, bar != NULL ? (size_t)(bar - text) : strlen(text)));
	struct cidr c;
	uint64_t bits = 0, most = 0;

	(void)where;
	memset(&c, 0, sizeof c);
	if (inet_pton(AF_INET6, host, c.address) == 1) {
		most = bits = 128;
	} else if (inet_pton(AF_INET, host, c.address + 12) == 1) {
		c.address[10] = c.address[11] = 0xFF;
		most = bits = 32;
	}
	free(host);
	if (most == 0 || (bar != NULL && (parse_number(bar + 1, &bits) != NULL || bits > most)))
		return "not an address with a prefix length (192.0.2.0/24, 2001:db8::/32)";
	c.bits = (unsigned)(bits + (128 - most));
	options.allow = grow(options.allow, (options.allow_count + 1) * sizeof c);
	options.allow[options.allow_count++] = c;
	return NULL;
}

static const char *set_store(enum store_kind kind, const char *path)
{
	if (options.store_given)
		return "one store is enough";
	options.store_given = true;
	options.store = kind;
	return path == NULL ? NULL : parse_text(path, &options.store_path);
}

static const char *parse_maildir(const char *text, void *where)
{
	(void)where;
	return set_store(STORE_MAILDIR, text);
}

static const char *parse_eml(const char *text, void *where)
{
	(void)where;
	return set_store(STORE_EML, text);
}

static const char *parse_mbox(const char *text, void *where)
{
	(void)where;
	return set_store(STORE_MBOX, text);
}

static const char *parse_batch(const char *text, void *where)
{
	(void)where;
	return set_store(STORE_BATCH, text);
}

static const char *parse_exec(const char *text, void *where)
{
	(void)where;
	return set_store(STORE_EXEC, text);
}

static const char *parse_discard(const char *text, void *where)
{
	(void)text;
	(void)where;
	return set_store(STORE_DISCARD, NULL);
}

static const char *parse_cut(const char *text, void *where)
{
	(void)where;
	if (strncmp(text, "messages:", 9) == 0)
		return parse_positive(text + 9, &options.cut_messages);
	return parse_positive(text, &options.cut_octets);
}

static const char *parse_keywords(const char *text, void *where)
{
	struct bsmtp_slice rest = slice_of(text);
	unsigned keys = 0;

	while (rest.len > 0) {
		size_t n = 0, bit = 1;
		while (n < rest.len && rest.at[n] != ',' && rest.at[n] != ' ')
			n++;
		while (n > 0 && bit <= BSMTP_KEYS_ALL &&
		    !same(slice(rest.at, n), bsmtp_keyword_name((enum bsmtp_keyword)bit)))
			bit <<= 1;
		if (n > 0 && bit > BSMTP_KEYS_ALL)
			return "a keyword is not known";
		keys |= n > 0 ? (unsigned)bit : 0;
		n += n < rest.len;
		rest = slice(rest.at + n, rest.len - n);
	}
	*(unsigned *)where = keys;
	return NULL;
}

static const char *parse_fault(const char *text, void *where)
{
	struct bsmtp_fault fault;
	struct bsmtp_slice time;
	const char *wrong;
	char *word;

	(void)where;
	list_add(&options.rules, slice_of(text));
	wrong = bsmtp_fault_parse(&fault, slice_of(options.rules.items[options.rules.count - 1]), &time);
	if (wrong == NULL && fault.action == BSMTP_FAULT_DELAY) {
		word = copy_slice(time);
		wrong = parse_time(word, &fault.delay_ms);
		free(word);
	}
	if (wrong != NULL)
		return wrong;
	options.faults = grow(options.faults, (options.fault_count + 1) * sizeof fault);
	options.faults[options.fault_count++] = fault;
	return NULL;
}

static const char *parse_ipv4(const char *text, void *where)
{
	(void)text;
	*(int *)where = AF_INET;
	return NULL;
}

static const char *parse_ipv6(const char *text, void *where)
{
	(void)text;
	*(int *)where = AF_INET6;
	return NULL;
}

static const char *parse_keep_going(const char *text, void *where)
{
	(void)text;
	*(uint64_t *)where = 0;
	return NULL;
}

static const struct option_row option_rows[] = {
	{ SEND, 's', "server", "ADDR", "where to (localhost:2525)", parse_text, &options.server },
	{ SEND, 0, "connect-command", "CMD", "speak through a command's input and output", parse_text, &options.connect_command },
	{ SEND, 'f', "from", "ADDR", "envelope sender; <> is the null sender", parse_from, &options.from },
	{ SEND, 'r', "to", "ADDR", "envelope recipient; repeatable, comma lists", parse_to, &options.to },
	{ SEND, 't', "to-headers", NULL, "recipients from To, Cc, Bcc; Bcc is removed", parse_flag, &options.to_headers },
	{ SEND, 0, "format", "auto|message|mbox|maildir|batch|raw", "what the input is (auto)", parse_format, &options.format },
	{ SEND, 0, "mbox-variant", "rd|o", "how >From is un-escaped (rd)", parse_variant, &options.mboxo },
	{ SEND, 0, "mode", "bsmtp|early|pipelining|lockstep|auto", "the manner (bsmtp)", parse_mode, &options.mode },
	{ SEND, 0, "fallback", "early|pipelining|lockstep", "the manner to try when BSMTP is refused", parse_fallback, &options.fallback },
	{ SEND, 0, "peers", "FILE", "who speaks BSMTP, for --mode auto", parse_text, &options.peers },
	{ SEND, 0, "grace", "TIME", "how long to wait for a refusal (3 x connect + 200ms)", parse_grace, &options.grace_ms },
	{ SEND, 0, "await-greeting", NULL, "wait for the greeting before opening", parse_flag, &options.await_greeting },
	{ SEND, 0, "framing", "auto|bdat|data", "how bodies are sent (auto)", parse_framing, &options.framing },
	{ SEND, 0, "blind", NULL, "send the body behind DATA without waiting for 354", parse_flag, &options.blind },
	{ SEND, 0, "helo", "NAME", "who to say we are (this host)", parse_domain, &options.helo },
	{ SEND, '4', "ipv4", NULL, "use IPv4 only", parse_ipv4, &options.family },
	{ SEND, '6', "ipv6", NULL, "use IPv6 only", parse_ipv6, &options.family },
	{ SEND, 'o', "output", "FILE", "write a batch (RFC 2442) instead; no network", parse_text, &options.output },
	{ SEND, 0, "progress", "auto|always|never", "show it on standard error (auto)", parse_progress, &options.progress },
	{ SEND, 0, "tls-name", "NAME", "whom the server's certificate must be for (the host)", parse_text, &options.tls_name },
	{ SEND, 0, "ca", "FILE", "certificates of authorities (the system's)", parse_text, &options.ca },
	{ SEND, 0, "pin", "PIN", "sha256:HEX, the server's certificate instead of an authority", parse_text, &options.pin },
	{ SEND, 0, "insecure", NULL, "take any certificate", parse_flag, &options.insecure },
	{ SEND, 0, "tickets", "FILE", "keep TLS tickets there, and resume", parse_text, &options.tickets },
	{ SEND, 0, "transid", NULL, "give each message an id: a retry is no duplicate", parse_flag, &options.transid },
	{ SEND, 0, "user", "NAME", "who to authenticate as", parse_text, &options.user },
	{ SEND, 0, "password-file", "FILE", "its first line is the password", parse_text, &options.password_file },
	{ SEND, 0, "stop-after", "N", "give up after N refused messages", parse_positive, &options.stop_after },
	{ SEND, 0, "keep-going", NULL, "never give up for refusals (the default)", parse_keep_going, &options.stop_after },
	{ LISTEN, 'd', "maildir", "DIR", "store in a Maildir (./received)", parse_maildir, NULL },
	{ LISTEN, 0, "eml", "DIR", "store as DIR/NNNNNN.eml and .json", parse_eml, NULL },
	{ LISTEN, 0, "mbox", "FILE", "append to an mbox (mboxrd)", parse_mbox, NULL },
	{ LISTEN, 0, "batch", "FILE", "append to a batch (RFC 2442)", parse_batch, NULL },
	{ LISTEN, 0, "exec", "CMD", "run CMD for each message", parse_exec, NULL },
	{ LISTEN, 0, "discard", NULL, "store nothing", parse_discard, NULL },
	{ LISTEN, 0, "transids", "FILE", "with --exec: keep ids there", parse_text, &options.transids },
	{ LISTEN, 0, "allow", "CIDR", "who may speak; repeatable (loopback)", parse_cidr, NULL },
	{ LISTEN, 0, "client-ca", "FILE", "who has a certificate of these authorities may speak", parse_text, &options.client_ca },
	{ LISTEN, 0, "users", "FILE", "accounts, made by bsmtp passwd; MAIL needs one then", parse_text, &options.users },
	{ LISTEN, 0, "require-tls", NULL, "nothing is taken in the clear", parse_flag, &options.require_tls },
	{ LISTEN, 0, "smtp", "allow|deny", "EHLO and HELO sessions (allow)", parse_smtp, &options.no_smtp },
	{ LISTEN, 0, "hostname", "NAME", "who to say we are (this host)", parse_domain, &options.hostname },
	{ LISTEN, 0, "max-size", "SIZE", "octets of a message (64m)", parse_size, &options.max_size },
	{ LISTEN, 0, "max-recipients", "N", "recipients of a message (1000)", parse_some, &options.max_recipients },
	{ LISTEN, 0, "max-connections", "N", "sessions at a time (1000)", parse_some, &options.max_connections },
	{ LISTEN, 0, "max-per-peer", "N", "sessions at a time from one address (no limit)", parse_positive, &options.max_per_peer },
	{ LISTEN, 0, "remember", "TIME", "how long TRANSIDs are known (7d)", parse_time, &options.remember_ms },
	{ LISTEN, 0, "bare-newlines", "reject|normalize", "bodies with bare CR or LF (reject)", parse_newlines, &options.normalize },
	{ LISTEN, 0, "count", "N", "stop after N messages", parse_positive, &options.count },
	{ LISTEN, 0, "once", NULL, "stop after the first session", parse_flag, &options.once },
	{ LISTEN, 0, "deadline", "TIME", "give up after TIME", parse_deadline, &options.deadline_ms },
	{ LISTEN, 0, "address-file", "FILE", "write the bound addresses there, once ready", parse_text, &options.address_file },
	{ LISTEN, 0, "stdio", NULL, "one session on standard input and output", parse_flag, &options.stdio },
	{ LISTEN, 0, "bsmtp", "accept|silent|refuse|close|unknown", "what the opening gets (accept)", parse_opening, &options.opening },
	{ LISTEN, 0, "reply", "RULE", "VERB[#N][ GLOB]=ACTION: a reply, drop, silent, delay TIME", parse_fault, NULL },
	{ LISTEN, 0, "latency", "TIME", "act on what arrives so much later", parse_time, &options.latency_ms },
	{ LISTEN, 0, "cut-after", "N", "drop the connection after N octets, or messages:N", parse_cut, NULL },
	{ LISTEN, 0, "keywords", "LIST", "offer only these EHLO keywords", parse_keywords, &options.keywords },
	{ BOTH, 0, "tls", NULL, "TLS from the first octet", parse_flag, &options.tls },
	{ BOTH, 0, "starttls", NULL, "TLS begun by the opening, or by STARTTLS", parse_flag, &options.starttls },
	{ BOTH, 0, "cert", "FILE", "our certificate, with its chain (PEM)", parse_text, &options.cert },
	{ BOTH, 0, "key", "FILE", "its key (in the same file)", parse_text, &options.key },
	{ BOTH, 0, "early-data", NULL, "with --tls: the stream in the first flight (needs --tickets)", parse_flag, &options.early_data },
	{ BOTH, 0, "fastopen", NULL, "TCP Fast Open: octets in the SYN", parse_flag, &options.fastopen },
	{ BOTH, 0, "timeout", "TIME", "silence allowed (5m)", parse_timeout, &options.timeout_ms },
	{ BOTH, 0, "json", NULL, "one JSON object a line on standard output", parse_flag, &options.json },
	{ BOTH, 'v', "trace", NULL, "the annotated transcript on standard error", parse_flag, &options.trace },
	{ BOTH, 'h', "help", NULL, "print this and exit", NULL, NULL },
};

static void usage(enum program program)
{
	printf("usage: bsmtp %s\n\n", program == SEND ? "send [options] [file ...]" :
	    "listen [options] [address ...]");
	for (size_t i = 0; i < COUNT(option_rows); i++) {
		const struct option_row *row = &option_rows[i];
		char names[80];
		if (!(row->program & program))
			continue;
		snprintf(names, sizeof names, "%c%c%s --%s%s%s", row->letter != 0 ? '-' : ' ',
		    row->letter != 0 ? row->letter : ' ', row->letter != 0 ? "," : " ", row->name,
		    row->argument != NULL ? " " : "", row->argument != NULL ? row->argument : "");
		printf("  %-28s", names);
		if (strlen(names) > 28)
			printf("\n%30s", "");
		printf(" %s\n", row->help);
	}
	puts("\nTIME: a number with ms, s, m, h, d (bare: seconds).  SIZE: k, m, g.\n"
	    "See bsmtp(1); the protocol is in bsmtp(7).");
}

static int set_option(const struct option_row *row, const char *text, const char *origin)
{
	const char *wrong = row->parse(text, row->where);

	if (wrong == NULL)
		return EX_OK;
	diag("%s%s %s: %s", origin, row->name, text != NULL ? text : "", wrong);
	return EX_USAGE;
}

/* BSMTP_MAX_SIZE for --max-size; a flag is set by anything but "" and "0". */
static int read_environment(enum program program)
{
	int status = EX_OK;

	for (size_t i = 0; i < COUNT(option_rows) && status == EX_OK; i++) {
		const struct option_row *row = &option_rows[i];
		char name[64] = "BSMTP_";
		const char *value;
		size_t n = strlen(name);
		for (const char *p = row->name; *p != '\0' && n < sizeof name - 1; p++)
			name[n++] = *p == '-' ? '_' : lower(*p) != *p ? *p : (char)(is_alpha(*p) ? *p - 32 : *p);
		name[n] = '\0';
		value = getenv(name);
		if (!(row->program & program) || row->parse == NULL || value == NULL || *value == '\0' ||
		    (row->argument == NULL && strcmp(value, "0") == 0))
			continue;
		status = set_option(row, value, "environment: ");
	}
	return status;
}

enum { DONE = -1 };

/* What may be repeated adds up, but not to what the environment says. */
static void forget_list(const struct option_row *row)
{
	if (row->parse == parse_to)
		list_free(&options.to);
	else if (row->parse == parse_cidr)
		options.allow_count = 0;
	else if (row->parse == parse_fault)
		options.fault_count = 0;
}

/* Reads the command line behind the verb: EX_OK, EX_USAGE, or DONE. */
static int read_options(enum program program, int argc, char **argv)
{
	struct option longs[COUNT(option_rows) + 1];
	char shorts[COUNT(option_rows) * 2 + 1];
	size_t n = 0, k = 0;
	int found, index = -1, status = read_environment(program);
	bool given[COUNT(option_rows)] = { false };

	options.store_given = false;            /* the command line wins */
	memset(longs, 0, sizeof longs);
	for (size_t i = 0; i < COUNT(option_rows); i++) {
		const struct option_row *row = &option_rows[i];
		if (!(row->program & program))
			continue;
		longs[n++] = (struct option){ row->name, row->argument != NULL, NULL, 256 + (int)i };
		if (row->letter != 0) {
			shorts[k++] = row->letter;
			if (row->argument != NULL)
				shorts[k++] = ':';
		}
	}
	shorts[k] = '\0';
	while (status == EX_OK && (found = getopt_long(argc, argv, shorts, longs, &index)) != -1) {
		const struct option_row *row = found >= 256 ? &option_rows[found - 256] : NULL;
		for (size_t i = 0; i < COUNT(option_rows) && found < 256; i++)
			if (option_rows[i].letter == found && (option_rows[i].program & program))
				row = &option_rows[i];
		if (found == '?' || row == NULL) {
			status = EX_USAGE;
			break;
		}
		if (row->parse == NULL) {
			usage(program);
			return DONE;
		}
		if (!given[row - option_rows])
			forget_list(row);
		given[row - option_rows] = true;
		status = set_option(row, optarg, "--");
	}
	for (int i = optind; i < argc && status == EX_OK; i++)
		list_add(&options.operands, slice_of(argv[i]));
	return status;
}

/* The first line of a file. */
static char *read_secret(const char *path)
{
	FILE *f = fopen(path, "r");
	char line[256] = "";
	char *secret = NULL;

	if (f == NULL || fgets(line, sizeof line, f) == NULL)
		diag("%s: %s", path, f == NULL ? strerror(errno) : "it is empty");
	else
		secret = copy_slice(slice(line, strcspn(line, "\r\n")));
	if (f != NULL)
		(void)fclose(f);
	wipe(line, sizeof line);
	return secret;
}

/* What both sides have of TLS: options that need one another, or exclude. */
static int check_tls(void)
{
	bool tls = options.tls || options.starttls;
	const char *wrong = NULL;

#ifdef BSMTP_NO_TLS
	if (tls || options.users != NULL || options.user != NULL)
		wrong = "this bsmtp was built without TLS";
#endif
	if (options.tls && options.starttls)
		wrong = "--tls and --starttls: it is one or the other";
	else if (!tls && (options.cert != NULL || options.client_ca != NULL || options.pin != NULL ||
	    options.tickets != NULL || options.ca != NULL || options.insecure || options.require_tls ||
	    options.tls_name != NULL))
		wrong = "without --tls or --starttls there are no certificates to speak of";
	else if (options.early_data && !options.tls)
		wrong = "--early-data: it is TLS from the first octet that has it: give --tls too";
	else if (options.key != NULL && options.cert == NULL)
		wrong = "--key: whose? give --cert too";
	else if (options.pin != NULL && !is_pin(options.pin))
		wrong = "--pin: sha256: and 64 hexadecimal digits are needed";
	if (wrong == NULL)
		return EX_OK;
	diag("%s", wrong);
	return EX_USAGE;
}

/* A name needs its password, and a way that nobody listens in on. */
static int check_user(void)
{
	struct address a;
	bool local = options.connect_command != NULL || (parse_address(&a, options.server) && a.local);

	if (options.insecure)
		diag("--insecure: whoever answers will be believed");
	if (options.user == NULL)
		return EX_OK;
	if (!options.tls && !options.starttls && !local) {
		diag("--user: a password goes over TLS or a local socket only");
		return EX_USAGE;
	}
	if (options.password_file == NULL) {
		diag("--user: give its --password-file too");
		return EX_USAGE;
	}
	options.password = read_secret(options.password_file);
	return options.password == NULL ? EX_NOINPUT : EX_OK;
}

static int check_listen(void)
{
	if (options.stdio && (options.operands.count > 0 || options.json)) {
		diag("--stdio: standard input and output are the session: no address, no --json");
		return EX_USAGE;
	}
	if (options.transids != NULL && options.store != STORE_EXEC) {
		diag("--transids: it goes with --exec; the other stores have a place of their own");
		return EX_USAGE;
	}
	return check_tls();
}

static int check_send(void)
{
	int status = check_tls();
	bool enveloped = options.format == FORMAT_AUTO || options.format == FORMAT_BATCH;

	if (options.early_data && options.tickets == NULL) {
		diag("--early-data: it takes a ticket: give --tickets FILE too");
		return EX_USAGE;
	}
	if (options.early_data && options.user != NULL) {
		diag("--early-data: a password does not go there, for it may be repeated: no --user");
		return EX_USAGE;
	}
	/* What may be repeated by others must be known when it comes again. */
	options.transid = options.transid || options.early_data || options.fastopen;
	if (options.output != NULL && strcmp(options.output, "-") == 0 && options.json) {
		diag("--output -: standard output is the batch: no --json");
		return EX_USAGE;
	}
	/* A batch says who its messages are for; a person at a terminal has none. */
	if (options.format != FORMAT_RAW && options.to.count == 0 && !options.to_headers &&
	    (!enveloped || (options.operands.count == 0 && isatty(STDIN_FILENO)))) {
		diag("no recipients: give --to ADDR, or -t to take them from the header");
		return EX_USAGE;
	}
	return status == EX_OK ? check_user() : status;
}

/* ---- completion ---- */

/* The words that an argument may be, apart by spaces; none where it is free. */
static void print_words(const struct option_row *row)
{
	if (strchr(row->argument, '|') == NULL)
		return;
	for (const char *c = row->argument; *c != '\0'; c++)
		putchar(*c == '|' ? ' ' : *c);
}

/* Help text without what means something to a shell or to its completion. */
static void print_plain(const char *text)
{
	for (; *text != '\0'; text++)
		putchar(strchr("'\"`$\\[]:", *text) != NULL ? ' ' : *text);
}

static void each_option(enum program program, const char *verb,
    void (*print)(const struct option_row *row, const char *verb))
{
	for (size_t i = 0; i < COUNT(option_rows); i++)
		if (option_rows[i].program & program)
			print(&option_rows[i], verb);
}

static void bash_name(const struct option_row *row, const char *verb)
{
	(void)verb;
	printf(" --%s", row->name);
}

static void bash_words(const struct option_row *row, const char *verb)
{
	if (row->argument == NULL)
		return;
	printf("\t\t%s:--%s) words='", verb, row->name);
	print_words(row);
	puts("' ;;");
}

static void complete_bash(const char *name)
{
	puts("_bsmtp() {\n"
	    "\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
	    "\tlocal verb=${COMP_WORDS[1]} words=\n"
	    "\tif [[ $COMP_CWORD -eq 1 ]]; then\n"
	    "\t\twords='send listen version passwd completion'\n"
	    "\telif [[ $cur == -* ]]; then\n"
	    "\t\tcase $verb in");
	fputs("\t\tsend) words='", stdout);
	each_option(SEND, "send", bash_name);
	fputs("' ;;\n\t\tlisten) words='", stdout);
	each_option(LISTEN, "listen", bash_name);
	puts("' ;;\n\t\tesac\n\telse\n\t\tcase $verb:$prev in\n"
	    "\t\tcompletion:completion) words='bash zsh fish' ;;");
	each_option(SEND, "send", bash_words);
	each_option(LISTEN, "listen", bash_words);
	printf("\t\tesac\n\tfi\n"
	    "\tmapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n}\n"
	    "complete -o default -F _bsmtp %s\n", name);
}

static void zsh_option(const struct option_row *row, const char *verb)
{
	(void)verb;
	printf("\t\t'--%s[", row->name);
	print_plain(row->help);
	putchar(']');
	if (row->argument != NULL && strchr(row->argument, '|') != NULL) {
		printf(":%s:(", row->name);
		print_words(row);
		putchar(')');
	} else if (row->argument != NULL) {
		printf(":%s:%s", row->name, strcmp(row->argument, "FILE") == 0 ||
		    strcmp(row->argument, "DIR") == 0 ? "_files" : "");
	}
	puts("' \\");
}

static void complete_zsh(const char *name)
{
	printf("#compdef %s\n_bsmtp() {\n\tlocal verb=$words[2]\n"
	    "\tif (( CURRENT == 2 )); then\n"
	    "\t\tcompadd send listen version passwd completion\n\t\treturn\n\tfi\n"
	    "\tshift words\n\t(( CURRENT-- ))\n\tcase $verb in\n\tsend) _arguments \\\n", name);
	each_option(SEND, "send", zsh_option);
	puts("\t\t'*:file:_files' ;;\n\tlisten) _arguments \\");
	each_option(LISTEN, "listen", zsh_option);
	puts("\t\t'*:address:' ;;\n\tcompletion) compadd bash zsh fish ;;\n\tesac\n}\n_bsmtp \"$@\"");
}

static const char *fish_name;

static void fish_option(const struct option_row *row, const char *verb)
{
	printf("complete -c %s -n '__fish_seen_subcommand_from %s' -l %s", fish_name, verb, row->name);
	if (row->letter != 0)
		printf(" -s %c", row->letter);
	if (row->argument != NULL && strchr(row->argument, '|') != NULL) {
		fputs(" -x -a '", stdout);
		print_words(row);
		putchar('\'');
	} else if (row->argument != NULL) {
		fputs(" -r", stdout);
	}
	fputs(" -d '", stdout);
	print_plain(row->help);
	puts("'");
}

static void complete_fish(const char *name)
{
	fish_name = name;
	printf("complete -c %s -n __fish_use_subcommand -f -a 'send listen version passwd completion'\n"
	    "complete -c %s -n '__fish_seen_subcommand_from completion' -f -a 'bash zsh fish'\n", name,
	    name);
	each_option(SEND, "send", fish_option);
	each_option(LISTEN, "listen", fish_option);
}

/* `bsmtp completion SHELL [NAME]`: the script for a program of that name. */
static int completion(int argc, char **argv)
{
	static const struct {
		const char *shell;
		void (*print)(const char *name);
	} shells[] = { { "bash", complete_bash }, { "zsh", complete_zsh }, { "fish", complete_fish } };

	for (size_t i = 0; argc > 2 && i < COUNT(shells); i++)
		if (strcmp(argv[2], shells[i].shell) == 0) {
			shells[i].print(argc > 3 ? argv[3] : "bsmtp");
			return DONE;
		}
	diag("completion needs a shell: bash, zsh or fish");
	return EX_USAGE;
}

/* ---- passwd ---- */

/* A line from the terminal without its echo, or from a pipe. */
static bool ask_secret(char *line, size_t size)
{
	struct termios before, mute;
	bool terminal = tcgetattr(STDIN_FILENO, &before) == 0;
	bool got;

	if (terminal) {
		fputs("Password: ", stderr);
		mute = before;
		mute.c_lflag &= ~(tcflag_t)ECHO;
		(void)tcsetattr(STDIN_FILENO, TCSAFLUSH, &mute);
	}
	got = fgets(line, (int)size, stdin) != NULL;
	if (terminal) {
		(void)tcsetattr(STDIN_FILENO, TCSAFLUSH, &before);
		fputc('\n', stderr);
	}
	got = got && (strchr(line, '\n') != NULL || feof(stdin));       /* else it is cut off */
	line[got ? strcspn(line, "\r\n") : 0] = '\0';
	return got && *line != '\0';
}

/* `bsmtp passwd NAME`: a line for the accounts of listen --users. */
static int passwd(int argc, char **argv)
{
	char secret[256], hash[256];
	bool good;

	if (argc == 3 && (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0)) {
		puts("usage: bsmtp passwd name");
		return DONE;
	}
	if (argc != 3 || *argv[2] == '\0' || *argv[2] == '-' || strpbrk(argv[2], ":\r\n") != NULL) {
		diag("passwd needs a name, without colon");
		return EX_USAGE;
	}
	if (!ask_secret(secret, sizeof secret)) {
		diag("passwd: no password was given, or one of over 254 octets");
		return EX_NOINPUT;
	}
	good = password_make(hash, sizeof hash, secret, strlen(secret));
	wipe(secret, sizeof secret);
	if (!good) {
		diag("passwd: no hash could be made");
		return EX_SOFTWARE;
	}
	printf("%s:%s\n", argv[2], hash);
	return DONE;
}

/* ---- sendmail's ---- */

/* The reverse-path or a forward-path as callers of sendmail write it. */
static int sendmail_address(const char *text, bool from)
{
	char *whole = qualified(trim(slice_of(text)));
	const char *wrong = from ? parse_from(whole, &options.from) :
	    parse_to(strchr(text, ',') != NULL || strchr(text, '<') != NULL ? text : whole, &options.to);

	if (wrong != NULL)
		diag("%s: %s", text, wrong);
	free(whole);
	return wrong == NULL ? EX_OK : EX_USAGE;
}

/* DSN (RFC 3461): what goes with MAIL or RCPT, where the server offers it. */
static void add_parameter(char **list, const char *name, const char *value)
{
	char text[512];

	snprintf(text, sizeof text, "%s %s=%.200s", or_empty(*list), name, value);
	free(*list);
	*list = copy_slice(slice_of(text));
}

static int sendmail_mode(const char *mode)
{
	static const char relay[] = "exec \"$0\" -i -f \"$BSMTP_SENDER\" -- \"$@\"";

	switch (mode[0]) {
	case 'm':
		return EX_OK;
	case 's':               /* a dialogue: each message is sent on by one of us */
		options.stdio = true;
		options.json = false;
		(void)set_store(STORE_EXEC, relay);
		return EX_OK;
	case 'S':
		options.format = FORMAT_BATCH;
		return EX_OK;
	default:
		diag("-b%s: there is no queue here, and no such mode", mode);
		return EX_USAGE;
	}
}

static int sendmail_option(int letter, const char *value)
{
	switch (letter) {
	case 't':
		options.to_headers = true;
		break;
	case 'o':               /* -oem, -odb and so on mean nothing here */
		if (strcmp(value, "i") != 0)
			break;
		/* fall through */
	case 'i':
		options.format = options.format == FORMAT_SENDMAIL ? FORMAT_MESSAGE : options.format;
		break;
	case 'f':
	case 'r':
		return sendmail_address(value, true);
	case 'b':
		return sendmail_mode(value);
	case 'v':
		options.trace = true;
		break;
	case 'N':
		add_parameter(&options.rcpt_parameters, "NOTIFY", value);
		break;
	case 'R':
		add_parameter(&options.parameters, "RET", value);
		break;
	case 'V':
		add_parameter(&options.parameters, "ENVID", value);
		break;
	case 'q':
		diag("-q: there is no queue here");
		return EX_USAGE;
	case '?':
		return EX_USAGE;
	default:                /* taken, and without meaning here */
		break;
	}
	return EX_OK;
}

/* The contract of sendmail(8), as its callers use it: operands are recipients. */
static int read_sendmail(int argc, char **argv, enum program *which)
{
	static const char letters[] = "+A:B:b:C:d:e:F:f:Gh:imN:no:O:p:q::R:r:stUV:vX:";
	int status = read_environment(SEND), letter;

	list_free(&options.to);
	options.format = FORMAT_SENDMAIL;
	while (status == EX_OK && (letter = getopt(argc, argv, letters)) != -1)
		status = sendmail_option(letter, optarg);
	for (int i = optind; i < argc && status == EX_OK; i++)
		status = sendmail_address(argv[i], false);
	*which = options.stdio ? LISTEN : SEND;
	if (status == EX_OK && *which == SEND && options.format != FORMAT_BATCH &&
	    options.to.count == 0 && !options.to_headers) {
		diag("no recipients: give them as operands, or -t to take them from the header");
		status = EX_USAGE;
	}
	return status;
}

static bool is_called(const char *path, const char *name)
{
	size_t n = strlen(path), k = strlen(name);

	return n >= k && strcmp(path + n - k, name) == 0;
}

/* ==== 15 main ============================================================ */

static void set_defaults(void)
{
	options.timeout_ms = 300000;
	options.remember_ms = 7 * 86400000ull;
	options.family = AF_UNSPEC;
	options.fallback = BSMTP_MODES;
	options.server = copy_slice(slice_of("localhost:2525"));
	options.store_path = copy_slice(slice_of("received"));
	options.max_size = 64 << 20;
	options.max_recipients = options.max_connections = 1000;
	options.keywords = BSMTP_KEYS_ALL;
}

static void free_options(void)
{
	list_free(&options.operands);
	list_free(&options.to);
	free(options.server);
	free(options.connect_command);
	free(options.from);
	free(options.helo);
	free(options.output);
	free(options.peers);
	free(options.cert);
	free(options.key);
	free(options.ca);
	free(options.client_ca);
	free(options.pin);
	free(options.tls_name);
	free(options.tickets);
	free(options.user);
	free(options.password_file);
	if (options.password != NULL)
		wipe(options.password, strlen(options.password));
	free(options.password);
	free(options.users);
	free(options.parameters);
	free(options.rcpt_parameters);
	free(options.store_path);
	free(options.allow);
	free(options.hostname);
	free(options.address_file);
	free(options.transids);
	free(options.faults);
	list_free(&options.rules);
}

static const char short_usage[] =
    "usage: bsmtp send [options] [file ...]\n"
    "       bsmtp listen [options] [address ...]\n"
    "       bsmtp version\n"
    "       bsmtp passwd name\n"
    "       bsmtp completion bash|zsh|fish [name]\n"
    "bsmtp send --help and bsmtp listen --help list the options.\n";

/* What the command line asks for: a program to run, or DONE, or what was wrong. */
static int read_arguments(int argc, char **argv, enum program *which)
{
	static char name[] = "bsmtp";
	const char *verb = argc > 1 ? argv[1] : "";

	if (is_called(argv[0], "sendmail")) {
		options.called = argv[0];
		return read_sendmail(argc, argv, which);
	}
	if (strcmp(verb, "version") == 0 || strcmp(verb, "--version") == 0) {
		puts("bsmtp " BSMTP_VERSION);
		return DONE;
	}
	if (strcmp(verb, "completion") == 0)
		return completion(argc, argv);
	if (strcmp(verb, "passwd") == 0)
		return passwd(argc, argv);
	if (strcmp(verb, "help") == 0 || strcmp(verb, "--help") == 0 || strcmp(verb, "-h") == 0) {
		fputs(short_usage, stdout);
		return DONE;
	}
	if (strcmp(verb, "send") != 0 && strcmp(verb, "listen") != 0) {
		fputs(short_usage, stderr);
		return EX_USAGE;
	}
	*which = strcmp(verb, "send") == 0 ? SEND : LISTEN;
	argv[1] = name;                 /* getopt_long() signs its complaints with it */
	return read_options(*which, argc - 1, argv + 1);
}

/* What a caller may have left otherwise: descriptors 0 to 2 that are closed, so that the
 * next file or socket would be one of them; children whose status nobody is told;
 * signals that are blocked. */
static bool set_right(void)
{
	sigset_t none;

	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
			return false;
	sigemptyset(&none);
	return sigprocmask(SIG_SETMASK, &none, NULL) == 0 && signal(SIGCHLD, SIG_DFL) != SIG_ERR &&
	    signal(SIGPIPE, SIG_IGN) != SIG_ERR && signal(SIGXFSZ, SIG_IGN) != SIG_ERR;
}

int main(int argc, char **argv)
{
	static char transcript[4096];
	enum program which = SEND;
	int status;

	if (!set_right())
		return EX_OSERR;
	set_defaults();
	status = read_arguments(argc, argv, &which);
	/* One write a line, and not one for each piece of it: ten times as fast. */
	if (status == EX_OK && options.trace)
		(void)setvbuf(stderr, transcript, _IOLBF, sizeof transcript);
	if (status == EX_OK)
		status = which == SEND ? check_send() : check_listen();
	if (status == EX_OK)
		status = which == SEND ? send_main() : listen_main();
	else if (status == DONE)
		status = stdout_good() ? EX_OK : EX_IOERR;
	free_options();
	return status;
}
#endif /* BSMTP_NO_MAIN */
