/* The client engine, fed any replies: cut anywhere they give the same events and
 * the same octets out; each message gets one fate, in order, and is delivered only
 * where, by counting, its own MAIL, a RCPT and its end were answered 2yz; what goes
 * out is commands and framed bodies, and never a body where one was not asked for. */
#include "fuzz.h"

/* flags: 2 bits the mode, 2 the framing (3: BDAT, and the first message breaks off),
 * blind, no_grace, 2 the pace.  Above the number of cuts: how far it writes, in steps
 * of 4, before the first reply is read. */
enum { MESSAGES = 3, COMMANDS = 512, ALL = 100000 };

/* Each line of a body begins with octet 1, and is known by it. */
static const char long_body[] =
	"\001xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n";
static const char *const bodies[MESSAGES] = { long_body, "\001.\r\n\001\r\n\001end", "" };
enum { LONG_TIMES = 60 };       /* more than the buffer holds */

struct sender {
	struct bsmtp_client c;
	struct bsmtp_client_config config;
	struct log *l;
	struct log wire;
	size_t begun, settled, rcpts, times, at;
	bool writing, awaits_354, opened, moved, abandons, cut;
	enum bsmtp_fate fates[MESSAGES];
};

static void event(struct sender *s, const struct bsmtp_client_event *e)
{
	if (e->type == BSMTP_CLIENT_NONE)
		return;
	addf(s->l, "\nevent %d %d %d %d %d %d %u ", (int)e->type, (int)e->verb, (int)e->fate, (int)e->error, e->late, e->code, e->rcpt);
	add(s->l, e->status.at, e->status.len);
	addf(s->l, "|");
	add(s->l, e->text.at, e->text.len);
	addf(s->l, "\n");
	s->opened = s->opened || e->type == BSMTP_CLIENT_OPENED;
	s->moved = s->moved || e->type == BSMTP_CLIENT_MOVED;
	CHECK((e->error != BSMTP_OK) == (e->type == BSMTP_CLIENT_ERROR || e->type == BSMTP_CLIENT_REFUSED));
	if (e->type != BSMTP_CLIENT_MESSAGE)
		return;
	CHECK(s->settled < s->begun);
	/* unless the session was refused, and MAIL with it */
	CHECK(e->fate != BSMTP_UNSENT || e->code == 503 || (s->abandons && s->settled == 0));
	CHECK(e->fate != BSMTP_DELIVERED || e->code / 100 == 2);
	CHECK(e->code != 0 || e->fate == BSMTP_UNKNOWN || e->fate == BSMTP_UNSENT);
	CHECK(e->code == 0 || e->fate != BSMTP_UNKNOWN);
	CHECK(!e->doubtful || e->fate == BSMTP_UNKNOWN || e->fate == BSMTP_UNSENT);
	s->fates[s->settled++] = e->fate;
}

static void send_all(struct sender *s)
{
	size_t n;
	const char *at = bsmtp_client_out(&s->c, &n);

	add(&s->wire, at, n);
	add(s->l, at, n);
	bsmtp_client_sent(&s->c, n);
	CHECK(s->wire.len == bsmtp_client_sent_total(&s->c) && s->wire.len <= bsmtp_client_position(&s->c));
}

static bool step(struct sender *s, bool dry)
{
	static const struct bsmtp_slice box = { "a@x", 3 }, parameters = { " RET=HDRS NOTIFY=NEVER", 22 };
	struct bsmtp_client_event e;
	const char *body;

	switch (bsmtp_client_want(&s->c)) {
	case BSMTP_WANT_MAIL:
		CHECK(!s->writing);
		s->rcpts = s->times = s->at = 0;
		if (s->begun == MESSAGES) {
			bsmtp_client_quit(&s->c);
			break;
		}
		s->writing = true;
		s->begun++;
		bsmtp_client_mail(&s->c, box, false, 7, parameters);
		break;
	case BSMTP_WANT_RCPT:
		CHECK(s->writing);
		if (s->rcpts++ < s->begun) {
			bsmtp_client_rcpt(&s->c, box, parameters);
			break;
		}
		bsmtp_client_data(&s->c);
		s->awaits_354 = bsmtp_client_want(&s->c) == BSMTP_WANT_REPLY;
		break;
	case BSMTP_WANT_BODY:
		CHECK(s->writing);
		s->awaits_354 = false;
		body = bodies[s->begun - 1];
		if (s->abandons && s->begun == 1 && s->times > LONG_TIMES * 3 / 4) {
			s->writing = false;
			s->cut = !bsmtp_client_abandon(&s->c);  /* only BDAT can say so */
			break;
		}
		s->at += bsmtp_client_body(&s->c, body + s->at, strlen(body) - s->at);
		if (body[s->at] == '\0' && body == long_body && ++s->times < LONG_TIMES)
			s->at = 0;
		if (body[s->at] == '\0' && bsmtp_client_want(&s->c) == BSMTP_WANT_BODY) {
			bsmtp_client_body_end(&s->c);
			s->writing = false;
		}
		break;
	case BSMTP_WANT_SKIP:
		s->awaits_354 = s->writing = false;
		bsmtp_client_skipped(&s->c, &e);
		event(s, &e);
		/* What is given up for what was answered is this one, not another. */
		CHECK(e.type != BSMTP_CLIENT_MESSAGE || s->settled == s->begun);
		break;
	case BSMTP_WANT_ROOM:
		break;
	case BSMTP_WANT_GRACE:
		if (!dry)
			return false;
		bsmtp_client_grace_over(&s->c);
		break;
	case BSMTP_WANT_TLS:
	case BSMTP_WANT_SECURED:
	case BSMTP_WANT_REPLY:
	case BSMTP_WANT_NOTHING:
		return false;
	}
	return true;
}

static bool out_is(struct sender *s, const char *line)
{
	size_t n;
	const char *at = bsmtp_client_out(&s->c, &n);

	return n == strlen(line) && memcmp(at, line, n) == 0;
}

/* A reply, read, may make the engine write, but not in the middle of a message. */
static void wrote(struct sender *s)
{
	/* or DATA, where the choice of framing had to wait */
	if (s->awaits_354 && out_is(s, "DATA\r\n") && s->wire.len >= 6 &&
	    memcmp(s->wire.text + s->wire.len - 6, "DATA\r\n", 6) != 0)
		return;
	if (out_is(s, "") || (s->awaits_354 && out_is(s, ".\r\n")) || (!s->writing && s->begun > 0 && out_is(s, "RSET\r\n")))
		return;
	if (bsmtp_client_want(&s->c) == BSMTP_WANT_SKIP && out_is(s, "RSET\r\n"))
		return;         /* in place of the chunks that are left */
	CHECK(s->begun == 0 && (out_is(s, "BSMTP c\r\n") || out_is(s, "EHLO c\r\n") || out_is(s, "HELO c\r\n")));
}

/* Whether a reply ends before `at`: only there may the sender act. */
static bool reply_ends(const char *in, size_t at)
{
	size_t start = at - 1;

	if (in[at - 1] != '\n')
		return false;
	while (start > 0 && in[start - 1] != '\n')
		start--;
	return at - start < 4 || in[start + 3] != '-';
}

/* What each reply should answer, from the octets sent alone. */
struct asked { char verb; size_t message; };

/* Checks that the stream is commands and framed bodies; returns how many replies
 * it asks for. */
static size_t read_wire(const struct log *wire, struct asked *asked)
{
	const char *at = wire->text, *end = wire->text + wire->len;
	bool data = false, body = false;
	size_t n = 0, message = 0;

	asked[n++] = (struct asked){ 'C', 0 };
	while (at < end) {
		const char *lf = memchr(at, '\n', (size_t)(end - at));
		size_t len = lf != NULL ? (size_t)(lf - at) + 1 : (size_t)(end - at);
		uint64_t chunk = 0;
		CHECK(lf != NULL && len >= 2 && lf[-1] == '\r' && n < COMMANDS);
		if (data && len == 3 && *at == '.') {
			data = false;
			asked[n++] = (struct asked){ '.', message };
		} else if (data && *at == '\001') {
			body = true;
		} else {
			/* between DATA and a body that is never sent, or never ended */
			CHECK(*at != '\001' && (!body || !data));
			CHECK(len <= BSMTP_COMMAND_MAX && memchr(at, '\001', len) == NULL);
			message += *at == 'M';
			data = memcmp(at, "DATA", 4) == 0;
			body = false;
			if (memcmp(at, "BDAT", 4) == 0) {
				bsmtp_number_parse(&chunk, at + 5, len - 5);
				CHECK(chunk <= (uint64_t)(end - at) - len);
				asked[n++] = (struct asked){ memcmp(at + len - 6, "LAST", 4) == 0 ? '.' : 'c', message };
				CHECK(chunk == 0 || at[len] == '\001' || at[len] == 'x' || at[len] == '\r' || at[len] == '\n' || at[len] == 'e');
			} else {
				asked[n++] = (struct asked){ *at == 'M' ? 'M' : *at == 'R' && at[1] == 'C' ? 'R' : data ? 'D' : 'o', message };
			}
		}
		at += len + chunk;
	}
	return n;
}

/* The codes of the replies, by their lines alone. */
static size_t read_replies(const struct input *input, int *codes)
{
	size_t at = 0, n = 0;

	while (at < input->len && n < COMMANDS) {
		struct bsmtp_reply_line line;
		ptrdiff_t used = bsmtp_reply_line_parse(&line, input->in + at, input->len - at);
		if (used <= 0)
			break;
		at += (size_t)used;
		codes[n] = line.code;
		n += !line.more;
	}
	return n;
}

/* No message is delivered without a 2yz to its MAIL, to a RCPT, and to its end. */
static void count(struct sender *s, const struct input *input)
{
	struct asked asked[COMMANDS + 1];
	int codes[COMMANDS];
	bool mail[MESSAGES + 1] = { false }, rcpt[MESSAGES + 1] = { false }, end[MESSAGES + 1] = { false };
	size_t asks = read_wire(&s->wire, asked), replies = read_replies(input, codes), shift = 0;

	/* Silent about BSMTP, the server answered what came behind, with a status; or a 354
	 * has shown it. */
	if (s->config.mode == BSMTP_MODE_BSMTP && replies > 1 && !s->opened && codes[1] / 100 == 2)
		shift = 1;
	if (s->moved)
		shift = 1;
	for (size_t i = 0; i < replies; i++) {
		size_t k = i > 0 ? i + shift : i;
		if (k >= asks || asked[k].message > MESSAGES || codes[i] / 100 != 2)
			continue;
		if (asked[k].verb == 'M')
			mail[asked[k].message] = true;
		else if (asked[k].verb == 'R')
			rcpt[asked[k].message] = true;
		else if (asked[k].verb == '.')
			end[asked[k].message] = true;
	}
	for (size_t i = 0; i < s->settled; i++)
		CHECK(s->fates[i] != BSMTP_DELIVERED || (mail[i + 1] && rcpt[i + 1] && end[i + 1]));
}

static void run(const struct input *input, enum cutting cutting, struct log *l)
{
	static const unsigned paces[] = { ALL, 0, 1, 3 };
	static struct sender s;
	static char out[BSMTP_CLIENT_OUT_MIN];
	unsigned char due[64];
	unsigned pace = paces[input->flags >> 6], most = input->more > 0 ? 4 * input->more : pace;
	struct bsmtp_client_event e;
	size_t at = 0, pieces = 0, turns = 0, end = 0;

	memset(&s, 0, sizeof s);
	s.l = l;
	s.abandons = (input->flags >> 2 & 3) == 3;
	s.config = (struct bsmtp_client_config){ .mode = (enum bsmtp_mode)(input->flags & 3),
		.framing = s.abandons ? BSMTP_FRAMING_BDAT : (enum bsmtp_framing)(input->flags >> 2 & 3), .blind = input->flags >> 4 & 1,
		.no_grace = input->flags >> 5 & 1, .helo = "c" };
	bsmtp_client_init(&s.c, &s.config, out, sizeof out, due,
	    input->more & 1 ? sizeof due : BSMTP_CLIENT_DUE_MIN);
	send_all(&s);
	while (bsmtp_client_want(&s.c) != BSMTP_WANT_NOTHING && !s.cut) {
		unsigned steps = 0;
		CHECK(++turns < 10000);
		if (turns > 1)
			most = pace;
		while (!s.cut && (steps < most || at == input->len) && step(&s, at == input->len)) {
			send_all(&s);
			CHECK(++steps < 1000);
			CHECK(s.config.mode != BSMTP_MODE_LOCKSTEP || s.abandons || bsmtp_client_owed(&s.c) <= 1);
		}
		if (at == input->len && steps == 0)
			break;
		while (at < input->len) {
			size_t used;
			char *piece;
			if (at == end)
				end = piece_end(input, cutting, at, &pieces);
			piece = exact(input->in + at, end - at);
			used = bsmtp_client_in(&s.c, piece, end - at, &e);
			CHECK(used > 0 && used <= end - at);
			event(&s, &e);
			wrote(&s);
			free(piece);
			at += used;
			if (bsmtp_client_want(&s.c) == BSMTP_WANT_NOTHING || reply_ends(input->in, at))
				break;
		}
		send_all(&s);
	}
	bsmtp_client_closed(&s.c, &e);
	event(&s, &e);
	while (bsmtp_client_unsettled(&s.c, &e))
		event(&s, &e);
	CHECK(s.settled == s.begun);
	addf(l, "\noffered %u lockstep %d", bsmtp_client_offered(&s.c), bsmtp_client_in_lockstep(&s.c));
	count(&s, input);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct input input;

	if (input_of(&input, data, len))
		same_however_cut(run, &input);
	return 0;
}
