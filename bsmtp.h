/* SPDX-License-Identifier: ISC
 *
 * bsmtp.h - batch SMTP in one stream: the protocol as a library.
 *
 * These are the engines of bsmtp(1): grammar, body codecs, the client's side
 * and the server's side of a session.  They do no input or output, allocate
 * nothing, read no clock and keep no global state.  The caller owns every
 * structure and every buffer; it moves octets between an engine and the
 * network, and obeys what the engine tells it.  Compile bsmtp.c with
 * -DBSMTP_NO_MAIN to have them alone: the object needs mem*() and str*() and
 * nothing else.
 *
 * Conventions, true of every function below:
 *
 *   - Lengths and offsets count octets.  No string is NUL-terminated unless
 *     it says so; NUL and 8-bit octets are octets like others.
 *   - A slice borrows memory.  One that a function hands out points into the
 *     octets it was given, or to constant memory, and is valid for as long as
 *     these are; one in an event is valid until the next call on that engine.
 *   - Parsers that return ptrdiff_t give the octets consumed (over 0), or
 *     BSMTP_MORE: the input ends before the element does, offer it again with
 *     more behind it; or BSMTP_BAD: it is no such element, whatever follows.
 *   - A structure filled with zeros is valid to hand to its init function.
 *     None holds anything that has to be released.
 *   - Split invariance: however a stream of octets is cut into calls, the
 *     events and the octets that come out are the same.
 */
#ifndef BSMTP_H
#define BSMTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BSMTP_VERSION "0.1.0"

/* ---- slices and results ------------------------------------------------ */

struct bsmtp_slice {
	const char *at;         /* first octet; may be NULL when len is 0 */
	size_t len;
};

#define BSMTP_MORE ((ptrdiff_t)0)
#define BSMTP_BAD ((ptrdiff_t)-1)

/* Limits, in octets.  RFC 5321 4.5.3.1 asks for 512 a command and a reply
 * line and 254 a mailbox; extensions lengthen the first two. */
enum {
	BSMTP_COMMAND_MAX = 2048,       /* a command line with its CRLF */
	BSMTP_REPLY_LINE_MAX = 2048,    /* a reply line with its CRLF */
	BSMTP_REPLY_MAX = 65536,        /* all lines of one reply */
	BSMTP_MAILBOX_MAX = 320,        /* local-part "@" domain: 64 + 1 + 255 */
	BSMTP_DOMAIN_MAX = 255,
	BSMTP_FROM_LINE_MAX = 512       /* an mbox From_ line */
};

/* ---- grammar: RFC 5321, 5322, 4155 ------------------------------------- */

/* One line of a reply (RFC 5321 4.2, RFC 2034).  `more` is set when other
 * lines of the same reply follow.  `status` is the enhanced status code, empty
 * where there is none or where its class differs from the code's; `text` is
 * what stands behind code and status, without CRLF. */
struct bsmtp_reply_line {
	int code;               /* 100 to 599 */
	bool more;
	struct bsmtp_slice status;
	struct bsmtp_slice text;
};

/* Parses the reply line at the head of in[0..len).  BSMTP_BAD also for a line
 * of more than BSMTP_REPLY_LINE_MAX octets, one with a bare CR or LF or a NUL,
 * and a code outside 100 to 599. */
ptrdiff_t bsmtp_reply_line_parse(struct bsmtp_reply_line *line, const char *in, size_t len);

/* A decimal number of 1 to 20 digits, at most UINT64_MAX.  Ends before the
 * first octet that is no digit; the end of the input ends it too. */
ptrdiff_t bsmtp_number_parse(uint64_t *number, const char *in, size_t len);

/* Whether the whole slice is a Domain or an address-literal, or a Mailbox
 * (RFC 5321 4.1.2, 4.1.3); with `utf8`, U-labels and UTF-8 local parts too
 * (RFC 6531 3.3). */
bool bsmtp_domain_valid(struct bsmtp_slice domain, bool utf8);
bool bsmtp_mailbox_valid(struct bsmtp_slice mailbox, bool utf8);

/* Whether the whole slice is a TRANSID's value, brackets and all: <token@token>, of
 * atoms and dots, 80 octets at most (RFC 1845 4.1). */
enum { BSMTP_TRANSID_MAX = 80 };
bool bsmtp_transid_valid(struct bsmtp_slice id);

/* Whether a mailbox, or any text, has octets over 127; and whether it is
 * well-formed UTF-8 (RFC 3629). */
bool bsmtp_has_8bit(struct bsmtp_slice text);
bool bsmtp_utf8_valid(struct bsmtp_slice text);

enum {                          /* flags for bsmtp_path_parse() */
	BSMTP_PATH_NULL = 1,            /* "<>" is taken: a reverse-path */
	BSMTP_PATH_POSTMASTER = 2,      /* "<Postmaster>" is taken: RCPT */
	BSMTP_PATH_UTF8 = 4,            /* RFC 6531 */
	BSMTP_PATH_LOCAL = 8            /* a local-part alone is taken: files */
};

/* A path in its angle brackets at the head of in[0..len), which holds all of
 * it.  `mailbox` gets what it names, without brackets and without the source
 * route, which is checked and dropped (RFC 5321 4.1.1.3, appendix C); it is
 * empty for "<>".  Never returns BSMTP_MORE. */
ptrdiff_t bsmtp_path_parse(struct bsmtp_slice *mailbox, const char *in, size_t len, unsigned flags);

/* One esmtp-param (RFC 5321 4.1.2) with the spaces before it, at the head of
 * in[0..len), the rest of a command line; `value` has a NULL `at` when there
 * is no "=".  Never returns BSMTP_MORE. */
struct bsmtp_parameter {
	struct bsmtp_slice keyword;
	struct bsmtp_slice value;
};
ptrdiff_t bsmtp_parameter_parse(struct bsmtp_parameter *parameter, const char *in, size_t len);

/* One header field with its folded lines and its line end, LF or CRLF, at the
 * head of in[0..len) (RFC 5322 2.2).  A field ends where a line begins without
 * white space, so it is complete only when that octet is there, or with `last`
 * when no more input comes.  `body` is what follows the colon, the folds and
 * the last line end included.  BSMTP_BAD at the blank line that ends the
 * header, and at anything else that is no field. */
struct bsmtp_field {
	struct bsmtp_slice name;
	struct bsmtp_slice body;
};
ptrdiff_t bsmtp_field_parse(struct bsmtp_field *field, const char *in, size_t len, bool last);

/* Whether the field's name is `name`, NUL-terminated, in any case. */
bool bsmtp_field_is(const struct bsmtp_field *field, const char *name);

/* The next address of an address-list (RFC 5322 3.4, obsolete forms read):
 * display names, comments, folds, routes and groups are passed over.  Moves
 * *list behind it.  Writes the addr-spec to out[0..BSMTP_MAILBOX_MAX) and its
 * length to *len; it is grammatical as a list, not yet as a Mailbox: check it
 * with bsmtp_mailbox_valid().  Returns 1; 0 at the end of the list; -1 where
 * the list is no list, or an address too long. */
int bsmtp_address_next(struct bsmtp_slice *list, char *out, size_t *len);

/* An mbox From_ line at the head of in[0..len), with its line end:
 * "From " sender date (RFC 4155), where the date has the form of asctime(3),
 * with or without seconds and zone.  `sender` is what stands before the date;
 * it may be no address.  BSMTP_BAD for all that has not the form. */
ptrdiff_t bsmtp_from_line_parse(struct bsmtp_slice *sender, const char *in, size_t len);

/* Splits an mbox into messages.  A From_ line counts at the start of the file
 * or after a blank line only, and that blank line belongs to it, not to the
 * message before; nor does a blank line at the very end of the file.  ">From "
 * quoting is undone: in variant mboxrd one ">" is taken from lines that are
 * ">"s and "From ", in mboxo from ">From " alone.  Every other octet passes. */
struct bsmtp_mbox {
	bool mboxo;             /* set by the caller: the variant is mboxo */
	unsigned char state;
	unsigned char pending;  /* a blank line withheld: 0, 1 (LF), 2 (CRLF) */
};

enum bsmtp_mbox_event {
	BSMTP_MBOX_NEED,        /* all but the octets left was used: give more */
	BSMTP_MBOX_BEGIN,       /* a message begins: its From_ line's sender */
	BSMTP_MBOX_TEXT,        /* octets of the message */
	BSMTP_MBOX_END,         /* the message ends */
	BSMTP_MBOX_DONE,        /* the file ends */
	BSMTP_MBOX_BAD          /* the file does not begin with a From_ line */
};

/* Takes octets from the head of in[0..len), writes to *used how many, and says
 * what they are; `out` is the sender or the text.  `last`: nothing follows
 * in[0..len).  At NEED, offer what was not used again with more behind it: at
 * most BSMTP_FROM_LINE_MAX octets are ever left over. */
enum bsmtp_mbox_event bsmtp_mbox_next(struct bsmtp_mbox *mbox, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *out);

/* Marks text for an mbox of variant mboxrd: one ">" is put before each line that
 * is ">"s and "From ".  All zeros to begin. */
struct bsmtp_quoter {
	unsigned char matched;  /* octets of "From " withheld, at a line's start */
	bool middle;            /* inside a line that is known to be another */
};

/* Reads from in[0..len), which has LF alone for line ends, returns the octets
 * used, and in *text the next run of marked text.  One of the two is over 0
 * unless len is. */
size_t bsmtp_quote(struct bsmtp_quoter *quoter, const char *in, size_t len,
    struct bsmtp_slice *text);

/* Ends the text: *text is what was withheld. */
void bsmtp_quote_end(struct bsmtp_quoter *quoter, struct bsmtp_slice *text);

/* ---- body codecs -------------------------------------------------------- */

/* Local text to the wire: LF and CRLF become CRLF, any other CR becomes a
 * space and is counted, and with `dots` a "." at the start of a line is
 * doubled (RFC 5321 4.5.2).  All zeros, `dots` as wanted, to begin. */
struct bsmtp_encoder {
	bool dots;
	bool inside;            /* the last octet written was not a line's end */
	bool cr;                /* a CR was read and not yet written */
	uint64_t strays;        /* CRs that became spaces */
};

/* Reads from in[0..len), writes to out[0..cap) and its length to *made;
 * returns the octets read.  Stops short of len only for want of room: with
 * cap of 4 or more it always advances. */
size_t bsmtp_encode(struct bsmtp_encoder *encoder, char *out, size_t cap, size_t *made,
    const char *in, size_t len);

/* Ends the text: its last line is given a line end if it has none.  Writes at
 * most 3 octets to out, returns how many. */
size_t bsmtp_encode_end(struct bsmtp_encoder *encoder, char *out);

/* DATA's body from the wire: takes away the doubled dots and finds the end,
 * CRLF "." CRLF and nothing else.  All zeros to begin, but for `lf`. */
struct bsmtp_decoder {
	bool lf;                /* set by the caller: LF ends a line too, as in files */
	unsigned char state;
	bool ended;             /* the end was read */
};

/* Reads from in[0..len), returns the octets used, and in *text one run of the
 * body's text among them.  One of the two is over 0 unless len is 0 or the end
 * was read. */
size_t bsmtp_decode(struct bsmtp_decoder *decoder, const char *in, size_t len,
    struct bsmtp_slice *text);

/* Watches or mends line ends in text that must have CRLF alone. */
struct bsmtp_newlines {
	bool normalize;         /* set by the caller: bare CR and LF become CRLF */
	bool cr;                /* the last octet was a CR */
	bool bad;               /* a bare CR or LF was seen */
	uint64_t offset;        /* octets read so far */
	uint64_t bad_at;        /* where the first bare one stood */
};

/* Reads from in[0..len), returns the octets used and in *text a run of text
 * made of them: as it came, or mended.  One of the two is over 0 unless len is. */
size_t bsmtp_newlines(struct bsmtp_newlines *newlines, const char *in, size_t len,
    struct bsmtp_slice *text);

/* Ends the text: a CR at its end is a bare one.  *text is what is to be added. */
void bsmtp_newlines_end(struct bsmtp_newlines *newlines, struct bsmtp_slice *text);

/* ---- the stream at rest: RFC 2442 ---------------------------------------- */

/* Reads a batch: the client's side of an SMTP session, written down with no
 * server present.  HELO, EHLO, BSMTP, RSET, QUIT, VERB, VERBOSE, TICK, NOOP and
 * blank lines give no event; several batches may follow one another.  Lines end
 * as the first one does, in CRLF or in LF.  All zeros to begin. */
struct bsmtp_batch {
	unsigned char state;
	bool begun;             /* the first line was read */
	uint64_t line;          /* the one being read, counted from 1 */
	struct bsmtp_decoder decoder;
};

enum bsmtp_batch_event {
	BSMTP_BATCH_NEED,       /* all but the octets left was used: give more */
	BSMTP_BATCH_MAIL,       /* a transaction: `text` is the reverse-path */
	BSMTP_BATCH_RCPT,       /* `text` is a forward-path of it */
	BSMTP_BATCH_BODY,       /* its message follows */
	BSMTP_BATCH_TEXT,       /* octets of the message, LF or CRLF as in the file */
	BSMTP_BATCH_END,        /* the message is whole */
	BSMTP_BATCH_DONE,       /* the file ends, no message open */
	BSMTP_BATCH_BAD         /* `text` says why, in `line` */
};

/* Takes octets from the head of in[0..len), writes to *used how many, and says
 * what they are.  `text` may be a path without domain (see BSMTP_PATH_LOCAL);
 * `parameters`, of MAIL and RCPT, is a list for bsmtp_parameter_parse() that was
 * checked.  `last`: nothing follows in[0..len).  At NEED, offer what was not used
 * again with more behind it: at most BSMTP_COMMAND_MAX octets are left over. */
enum bsmtp_batch_event bsmtp_batch_next(struct bsmtp_batch *batch, const char *in, size_t len,
    bool last, size_t *used, struct bsmtp_slice *text, struct bsmtp_slice *parameters);

/* ---- words --------------------------------------------------------------- */

enum bsmtp_mode {               /* the four manners; protocol in bsmtp(7) */
	BSMTP_MODE_BSMTP,
	BSMTP_MODE_EARLY,
	BSMTP_MODE_PIPELINING,
	BSMTP_MODE_LOCKSTEP,
	BSMTP_MODES
};

enum bsmtp_framing { BSMTP_FRAMING_AUTO, BSMTP_FRAMING_BDAT, BSMTP_FRAMING_DATA, BSMTP_FRAMINGS };

enum bsmtp_fate {               /* of a message, or of one recipient of it */
	BSMTP_UNSENT,           /* nothing of it left */
	BSMTP_UNKNOWN,          /* sent, whole or in part, and no final reply */
	BSMTP_DELIVERED,        /* 2yz to its end, and to one recipient or more */
	BSMTP_DEFERRED,         /* 4yz */
	BSMTP_REJECTED,         /* 5yz */
	BSMTP_FATES
};

enum bsmtp_keyword {            /* service extensions, as bits */
	BSMTP_KEY_BSMTP = 1 << 0,
	BSMTP_KEY_PIPELINING = 1 << 1,
	BSMTP_KEY_8BITMIME = 1 << 2,
	BSMTP_KEY_SMTPUTF8 = 1 << 3,
	BSMTP_KEY_CHUNKING = 1 << 4,
	BSMTP_KEY_ENHANCEDSTATUSCODES = 1 << 5,
	BSMTP_KEY_SIZE = 1 << 6,
	BSMTP_KEY_LIMITS = 1 << 7,      /* RFC 9422 */
	BSMTP_KEY_STARTTLS = 1 << 8,
	BSMTP_KEY_AUTH = 1 << 9,        /* RFC 4954: PLAIN and LOGIN */
	BSMTP_KEYS_ALL = (1 << 10) - 1, /* those that a server here can offer */
	BSMTP_KEY_DSN = 1 << 10         /* RFC 3461: the client passes parameters on */
};

enum bsmtp_error {              /* why a session ended before its time */
	BSMTP_OK,
	BSMTP_E_REFUSED,        /* the opening was answered 5yz */
	BSMTP_E_DEFERRED,       /* the opening was answered 4yz */
	BSMTP_E_REPLY,          /* octets that are no reply */
	BSMTP_E_REPLY_LONG,     /* a reply line, or a reply, without end */
	BSMTP_E_UNASKED,        /* a reply to nothing */
	BSMTP_E_OUT_OF_PLACE,   /* a code that cannot answer that command */
	BSMTP_E_MISCOUNTED,     /* QUIT and its 221 did not meet: a reply was too many or too
	                         * few; see `firm` below */
	BSMTP_E_RUN,            /* a body was run as commands */
	BSMTP_E_STOPPED,        /* 421, or 221 before QUIT: the server stops */
	BSMTP_E_NO_TLS,         /* TLS is wanted, and not to be had */
	BSMTP_E_AUTH,           /* the name or its password is not accepted */
	BSMTP_E_CLOSED,         /* the connection ended with replies due */
	BSMTP_ERRORS
};

enum bsmtp_verb {               /* commands, and two places named like them */
	BSMTP_VERB_CONNECT,     /* the connection itself: the greeting */
	BSMTP_VERB_HELO,
	BSMTP_VERB_EHLO,
	BSMTP_VERB_BSMTP,
	BSMTP_VERB_MAIL,
	BSMTP_VERB_RCPT,
	BSMTP_VERB_DATA,
	BSMTP_VERB_BDAT,
	BSMTP_VERB_BODY,        /* the end of a body */
	BSMTP_VERB_RSET,
	BSMTP_VERB_NOOP,
	BSMTP_VERB_VRFY,
	BSMTP_VERB_EXPN,
	BSMTP_VERB_HELP,
	BSMTP_VERB_STARTTLS,
	BSMTP_VERB_AUTH,
	BSMTP_VERB_QUIT,
	BSMTP_VERB_FOREIGN,     /* HTTP and kin: not a mail client */
	BSMTP_VERB_UNKNOWN,
	BSMTP_VERBS
};

/* The words for them, NUL-terminated: "lockstep", "delivered", "PIPELINING"
 * (of one bit), a sentence for an error, "MAIL". */
const char *bsmtp_mode_name(enum bsmtp_mode mode);
const char *bsmtp_framing_name(enum bsmtp_framing framing);
const char *bsmtp_fate_name(enum bsmtp_fate fate);
const char *bsmtp_keyword_name(enum bsmtp_keyword keyword);
const char *bsmtp_error_text(enum bsmtp_error error);
const char *bsmtp_verb_name(enum bsmtp_verb verb);

/* Called with every line that an engine writes or reads, for transcripts.
 * COMMAND and REPLY: the line without CRLF; BODY: an empty line, and the octets
 * of that body or BDAT chunk on the wire, once it is whole. */
enum bsmtp_tap_kind { BSMTP_TAP_COMMAND, BSMTP_TAP_BODY, BSMTP_TAP_REPLY };
typedef void bsmtp_tap(void *context, enum bsmtp_tap_kind kind, struct bsmtp_slice line,
    uint64_t octets);

/* ---- the client's side ---------------------------------------------------- */

struct bsmtp_client_config {    /* constant while the engine lives */
	enum bsmtp_mode mode;
	enum bsmtp_framing framing;
	bool await_greeting;    /* wait for the greeting in any mode */
	bool no_grace;          /* do not wait for the reply to BSMTP */
	bool blind;             /* BSMTP and DATA: do not wait for 354 */
	bool starttls;          /* TLS is begun by the opening, or by STARTTLS */
	const char *helo;       /* NUL-terminated: Domain or address-literal */
	const char *user, *password;    /* NUL-terminated, for AUTH; NULL: none */
	bsmtp_tap *tap;         /* may be NULL */
	void *tap_context;
};

/* What the engine can use now.  Replies may be fed at any time; the out
 * octets should be sent whenever there are any. */
enum bsmtp_want {
	BSMTP_WANT_MAIL,        /* bsmtp_client_mail() or bsmtp_client_quit() */
	BSMTP_WANT_RCPT,        /* bsmtp_client_rcpt() or bsmtp_client_data() */
	BSMTP_WANT_BODY,        /* bsmtp_client_body() or bsmtp_client_body_end() */
	BSMTP_WANT_SKIP,        /* drop the rest of this message, then
	                         * bsmtp_client_skipped() */
	BSMTP_WANT_ROOM,        /* octets out must be sent first */
	BSMTP_WANT_GRACE,       /* a reply, or bsmtp_client_grace_over() */
	BSMTP_WANT_TLS,         /* octets out sent, the TLS client's first flight;
	                         * then a reply, in the clear still */
	BSMTP_WANT_SECURED,     /* the TLS handshake, and bsmtp_client_secured() */
	BSMTP_WANT_REPLY,       /* a reply */
	BSMTP_WANT_NOTHING      /* the session is over */
};

enum bsmtp_client_event_type {
	BSMTP_CLIENT_NONE,      /* nothing to tell */
	BSMTP_CLIENT_GREETING,  /* the greeting came */
	BSMTP_CLIENT_OPENED,    /* the opening was answered 2yz */
	BSMTP_CLIENT_REFUSED,   /* it was answered otherwise, or that of BSMTP by a
	                         * close: the client sends no more; `late`: after
	                         * the stream had begun */
	BSMTP_CLIENT_SECURE,    /* all that follows the octets used is TLS */
	BSMTP_CLIENT_RCPT,      /* the reply to RCPT number `rcpt` of the message */
	BSMTP_CLIENT_MOVED,     /* the replies told of the message's recipients are
	                         * each that of the next one, and this is the
	                         * first one's: the server was silent about the
	                         * opening, as a 354 has shown */
	BSMTP_CLIENT_MESSAGE,   /* the message's fate; the reply is that which
	                         * decided it, its code 0 where there was none */
	BSMTP_CLIENT_NOTE,      /* RSET was refused; it decides nothing */
	BSMTP_CLIENT_QUIT,      /* QUIT was answered: all is settled */
	BSMTP_CLIENT_ERROR      /* `error`; the client sends no more */
};

struct bsmtp_client_event {
	enum bsmtp_client_event_type type;
	enum bsmtp_verb verb;   /* the command that the reply answers */
	enum bsmtp_fate fate;   /* MESSAGE; RCPT, MOVED: what its own reply says */
	enum bsmtp_error error; /* REFUSED, ERROR */
	bool late;
	bool doubtful;          /* MESSAGE: which replies are its own is not known,
	                         * nor then what its recipients got */
	bool firm;              /* any type: the MESSAGE told last is certain, for
	                         * the replies before and after its own say the same;
	                         * where this never comes, a reply too many or too few
	                         * could have shifted its fate */
	unsigned rcpt;          /* RCPT: counted from 0 */
	int code;               /* last line of the reply; 0: no reply */
	struct bsmtp_slice status;
	struct bsmtp_slice text;
};

struct bsmtp_client {           /* complete, to be embedded; fields are private */
	const struct bsmtp_client_config *config;
	/* octets out: [sent, ready) may go; [ready, made) is a chunk still open,
	 * its first `header` octets kept free for the BDAT line */
	char *out;
	size_t out_size, sent, ready, made, header;
	bool chunk_open;
	uint64_t sent_total;
	/* replies due: a ring of the verbs that asked for them */
	unsigned char *due;
	size_t due_size, due_first, due_count, mails_due;
	unsigned char state;
	bool secure;            /* TLS is on */
	bool auth_plain, auth_login, authed;
	unsigned char auth_asked;       /* LOGIN's questions so far */
	bool lockstep;          /* wait after each command */
	bool opened;            /* the opening was answered 2yz */
	unsigned char alignment;        /* of the replies with the commands */
	bool streamed;          /* commands followed the opening */
	bool opening_refused, auth_refused;
	unsigned offered;       /* enum bsmtp_keyword bits of the opening's reply */
	uint64_t mail_max, rcpt_max;
	/* the message being written */
	bool unsure;            /* RSET is needed before the next MAIL */
	bool writing;           /* its MAIL was written, its end not */
	bool addressed;         /* so were all its recipients */
	bool bdat;              /* its body is framed by BDAT */
	uint64_t body_octets;
	struct bsmtp_encoder encoder;
	uint64_t strays;
	/* the message whose replies are being read */
	bool judging;           /* its MAIL was answered, its fate not given */
	bool bare;              /* its end mark went alone, behind 354 */
	bool all_good, all_bad; /* every reply of it, and the one before */
	bool put_off;           /* one of these is 4yz */
	int previous;           /* code of the reply before this one */
	int before, mail;       /* of the one before MAIL's, and MAIL's */
	int refused[4];         /* by each that can decide: a code, or 0 */
	unsigned rcpts, rcpts_good;
	unsigned char uniform;  /* of the fate told last: whether all replies agreed */
	struct bsmtp_client_event verdict;      /* the reply that decides, so far */
	char verdict_text[BSMTP_REPLY_LINE_MAX];
	/* a reply under way */
	size_t line_len, reply_len;
	unsigned reply_lines;
	int reply_code;
	unsigned char reply_statuses;   /* the enhanced ones of its lines */
	char line[BSMTP_REPLY_LINE_MAX];
};

/* Begins a session.  `out` is memory for octets to be sent, of at least
 * BSMTP_CLIENT_OUT_MIN octets; `due` for one octet per reply awaited, at least
 * BSMTP_CLIENT_DUE_MIN.  All of them, and *config, must outlive the session.
 * The opening is written at once where the mode does not wait. */
enum { BSMTP_CLIENT_OUT_MIN = 2 * BSMTP_COMMAND_MAX, BSMTP_CLIENT_DUE_MIN = 16 };
void bsmtp_client_init(struct bsmtp_client *client, const struct bsmtp_client_config *config,
    void *out, size_t out_size, void *due, size_t due_size);

enum bsmtp_want bsmtp_client_want(const struct bsmtp_client *client);

/* The parts of a transaction, each allowed when bsmtp_client_want() says so.
 * The mailboxes must be valid (bsmtp_mailbox_valid(), or empty for the null
 * reverse-path, or "Postmaster" for RCPT).  `utf8`: the message needs SMTPUTF8.
 * `size`: its octets, as near as is known; 0 when it is not.  `parameters` are
 * esmtp-params to go with it, as from a batch: those of SIZE, 8BITMIME, SMTPUTF8
 * and DSN (RFC 3461) are known.  What the server does not offer is left out. */
void bsmtp_client_mail(struct bsmtp_client *client, struct bsmtp_slice mailbox, bool utf8,
    uint64_t size, struct bsmtp_slice parameters);
void bsmtp_client_rcpt(struct bsmtp_client *client, struct bsmtp_slice mailbox,
    struct bsmtp_slice parameters);
void bsmtp_client_data(struct bsmtp_client *client);    /* no more recipients */

/* May be called right after the last bsmtp_client_rcpt(), for bsmtp_client_data() may
 * have to wait: should the session end there, it is known that all were refused. */
void bsmtp_client_rcpt_end(struct bsmtp_client *client);

/* Local text of the body, LF or CRLF (see bsmtp_encode()).  Returns the octets
 * taken, less than len when there is no more room. */
size_t bsmtp_client_body(struct bsmtp_client *client, const char *in, size_t len);
void bsmtp_client_body_end(struct bsmtp_client *client);

/* The body breaks off, and must not count: under BDAT, where RSET drops what was
 * sent of it, true, and the next message may follow.  Under DATA nothing says so
 * but the end of the connection: false, send what is out and close. */
bool bsmtp_client_abandon(struct bsmtp_client *client);

/* The message was dropped as asked.  *event is its MESSAGE event when no reply
 * to come can decide more, else NONE. */
void bsmtp_client_skipped(struct bsmtp_client *client, struct bsmtp_client_event *event);

void bsmtp_client_quit(struct bsmtp_client *client);

/* Before bsmtp_client_mail(), for a message that has to know what is offered (it has
 * a TRANSID): where the opening's reply is still due, in a mode that does not wait for
 * it, the engine waits for it now, in mode bsmtp until bsmtp_client_grace_over() at
 * most; true.  False: there is nothing to wait for. */
bool bsmtp_client_await_opening(struct bsmtp_client *client);

/* Octets to be sent now, *len of them (0: none), and how many were. */
const char *bsmtp_client_out(const struct bsmtp_client *client, size_t *len);
void bsmtp_client_sent(struct bsmtp_client *client, size_t len);

/* Octets received: reads from in[0..len) to the end of a reply at most, returns
 * the octets used and fills *event (NONE where the reply tells nothing).  What
 * the engine wants then should be written before the rest is given, for in
 * lockstep a reply that comes before its command answers nothing.  After REFUSED
 * with `late` set replies are still read and counted; after an ERROR, and any
 * other REFUSED, nothing more is. */
size_t bsmtp_client_in(struct bsmtp_client *client, const char *in, size_t len,
    struct bsmtp_client_event *event);

void bsmtp_client_grace_over(struct bsmtp_client *client);

/* TLS is established: the client opens again, and nothing said before counts
 * (RFC 3207 4.2).  `agreed`: the peer has agreed to BSMTP in the handshake, by ALPN.
 * For TLS from the first octet, call it before anything else: behind
 * bsmtp_client_init() with a config that has no `starttls`.  Early data goes by the
 * ticket of a session that agreed: `agreed`, and where the handshake then shows that
 * this one does not, once more without. */
void bsmtp_client_secured(struct bsmtp_client *client, bool agreed);

/* The server closed, or the caller has given up.  Then
 * bsmtp_client_unsettled() gives an event for each message begun and not yet
 * settled, in order, until it returns false. */
void bsmtp_client_closed(struct bsmtp_client *client, struct bsmtp_client_event *event);
bool bsmtp_client_unsettled(struct bsmtp_client *client, struct bsmtp_client_event *event);

/* Octets written so far to `out` since the start, sent or not: taken before
 * bsmtp_client_mail(), it is where the message begins in the stream. */
uint64_t bsmtp_client_position(const struct bsmtp_client *client);

/* Octets of the stream that have been sent. */
uint64_t bsmtp_client_sent_total(const struct bsmtp_client *client);

/* How many transactions the server takes in a session, and recipients in each
 * (RFC 9422); 0: it has not said. */
void bsmtp_client_limits(const struct bsmtp_client *client, uint64_t *mails, uint64_t *rcpts);

/* Replies that are awaited, and the command that the next of them answers by counting;
 * BSMTP_VERB_UNKNOWN where there is none. */
size_t bsmtp_client_owed(const struct bsmtp_client *client);
enum bsmtp_verb bsmtp_client_awaits(const struct bsmtp_client *client);

/* What the opening's reply offered, as enum bsmtp_keyword bits, and what may be used
 * now: until the reply to BSMTP is there PIPELINING, CHUNKING, 8BITMIME, SMTPUTF8 and
 * SIZE may, by prearrangement.  BSMTP itself stands for TRANSID.  Whether commands wait
 * for each other's replies; CRs that became spaces. */
unsigned bsmtp_client_offered(const struct bsmtp_client *client);
unsigned bsmtp_client_usable(const struct bsmtp_client *client);
bool bsmtp_client_in_lockstep(const struct bsmtp_client *client);
uint64_t bsmtp_client_strays(const struct bsmtp_client *client);

/* ---- the server's side ---------------------------------------------------- */

enum bsmtp_opening {            /* what BSMTP gets; see --bsmtp in bsmtp(1) */
	BSMTP_OPENING_ACCEPT,
	BSMTP_OPENING_SILENT,
	BSMTP_OPENING_REFUSE,
	BSMTP_OPENING_CLOSE,
	BSMTP_OPENING_UNKNOWN,
	BSMTP_OPENINGS
};
const char *bsmtp_opening_name(enum bsmtp_opening opening);

enum bsmtp_fault_action {
	BSMTP_FAULT_REPLY,      /* this reply instead; 2yz accepts, others refuse */
	BSMTP_FAULT_DROP,       /* close in place of the reply */
	BSMTP_FAULT_SILENT,     /* no reply, as if it were lost */
	BSMTP_FAULT_DELAY       /* act on it after a while */
};

/* One rule of --reply.  `glob` is matched (* and ?, any case) with the
 * command's argument: for MAIL and RCPT the mailbox, without brackets. */
struct bsmtp_fault {
	enum bsmtp_verb verb;
	uint64_t nth;           /* 0: each time */
	struct bsmtp_slice glob;        /* empty: any */
	enum bsmtp_fault_action action;
	struct bsmtp_slice reply;       /* "550 5.1.1 no such user" */
	uint64_t delay_ms;
	uint64_t seen;          /* matches so far; counted by the engine */
};

/* Parses 'VERB[#N][ GLOB]=ACTION'; the slices borrow from `spec`.  For `delay`
 * only the word is read and *time is what stands behind it.  Returns NULL, or
 * what is wrong with it, NUL-terminated. */
const char *bsmtp_fault_parse(struct bsmtp_fault *fault, struct bsmtp_slice spec,
    struct bsmtp_slice *time);

/* Every reply that a server gives is a row of one table, by this name.  Those
 * up to ANSWER_CUSTOM may be used by the caller to settle a message. */
enum bsmtp_answer {
	BSMTP_ANSWER_STORED,            /* 250 2.0.0 stored */
	BSMTP_ANSWER_NO_SPACE,          /* 452 4.3.1 */
	BSMTP_ANSWER_STORE_FAILED,      /* 451 4.3.0 */
	BSMTP_ANSWER_NOT_TAKEN,         /* 554 5.3.0: the store does not want it */
	BSMTP_ANSWER_LOOPS,             /* 554 5.4.6: too many Received fields */
	BSMTP_ANSWER_TOO_MANY,          /* 452 4.5.3, of RCPT */
	BSMTP_ANSWER_DASH,              /* 553 5.1.3, of RCPT: a command would take it
	                                 * for an option */
	BSMTP_ANSWER_STOPPING,          /* 421 4.3.2 shutting down */
	BSMTP_ANSWER_TIMEOUT,           /* 421 4.4.2 */
	BSMTP_ANSWER_BUSY,              /* 421 4.7.0 too many connections */
	BSMTP_ANSWER_NOT_ALLOWED,       /* 554 5.7.1 */
	BSMTP_ANSWER_AUTH_FAILED,       /* 535 5.7.8, of AUTH */
	BSMTP_ANSWER_AUTH_LATER,        /* 454 4.7.0, of AUTH */
	BSMTP_ANSWER_DUPLICATE,         /* 250 2.0.0: its TRANSID is that of a stored one */
	BSMTP_ANSWER_UNDER_WAY,         /* 451 4.3.0: of one that is not stored yet */
	BSMTP_ANSWER_INTERNAL           /* the first of the engine's own */
};

/* Asked by the engine about each recipient whose form is good, with the context of its
 * server: BSMTP_ANSWER_STORED takes it; BSMTP_ANSWER_DUPLICATE says that the id of this
 * transaction (TRANSID, told with the event MAIL) and this recipient are known, so
 * that it is answered 2yz whatever would be said of it now, and the message is not
 * stored for it again; any other answer refuses it. */
typedef enum bsmtp_answer bsmtp_judge(void *context, struct bsmtp_slice mailbox);

struct bsmtp_server_config {    /* shared by sessions; constant but for `seen` */
	const char *hostname;   /* NUL-terminated */
	uint64_t max_size;      /* octets of a message */
	unsigned max_recipients;
	unsigned keywords;      /* enum bsmtp_keyword bits to offer */
	enum bsmtp_opening opening;
	bool no_smtp;           /* EHLO and HELO are refused */
	bool starttls;          /* STARTTLS is offered, and that of BSMTP taken */
	bool require_tls;       /* without TLS there is no MAIL, and no BSMTP */
	bool auth;              /* AUTH is offered, and MAIL needs it */
	bool stopping;          /* MAIL is answered 421: no new transactions */
	bool normalize;         /* bare CR and LF are mended, not refused */
	struct bsmtp_fault *faults;
	size_t fault_count;
	bsmtp_judge *judge;     /* may be NULL: every recipient is taken */
	bsmtp_tap *tap;         /* may be NULL */
};

/* A reply given or owed, in the queue that the caller lends. */
struct bsmtp_held {
	uint64_t argument;
	unsigned short answer;
	bool open;              /* not settled yet: nothing behind it may go */
};

enum bsmtp_server_event_type {
	BSMTP_SERVER_MORE,      /* all octets were used */
	BSMTP_SERVER_FULL,      /* the queue of replies is full: send some first; or
	                         * AUTH is not settled yet */
	BSMTP_SERVER_HELLO,     /* a session was opened: `text` is who it says */
	BSMTP_SERVER_MAIL,      /* a transaction begins: `text` is the reverse-path */
	BSMTP_SERVER_RCPT,      /* `text` is a forward-path of it, accepted; `known`:
	                         * it has the message already */
	BSMTP_SERVER_TEXT,      /* `text` is the next part of the body */
	BSMTP_SERVER_MESSAGE,   /* the message is whole: store it, then
	                         * bsmtp_server_settle() with `ticket`; `number`: the
	                         * octets of its body.  Where every
	                         * recipient is known there was no TEXT, and nothing
	                         * is to be stored: BSMTP_ANSWER_DUPLICATE */
	BSMTP_SERVER_ABORT,     /* there will be no message: forget what there is */
	BSMTP_SERVER_STARTTLS,  /* send what is owed; all that follows the octets
	                         * used is TLS: bsmtp_server_secured().  `number` is 1
	                         * for BSMTP's opening, behind which the client's
	                         * first flight comes at once; behind STARTTLS there
	                         * must be none yet */
	BSMTP_SERVER_AUTH,      /* `text` and `secret` are a name and its password:
	                         * bsmtp_server_settle() with `ticket`; until then
	                         * nothing is read */
	BSMTP_SERVER_DELAY,     /* call again after `number` milliseconds */
	BSMTP_SERVER_END        /* nothing more is read: send what is owed, close */
};

struct bsmtp_server_event {
	enum bsmtp_server_event_type type;
	struct bsmtp_slice text;
	struct bsmtp_slice secret;
	struct bsmtp_slice transid;     /* MAIL: with its brackets; empty: none */
	uint64_t number;
	uint64_t ticket;
	bool utf8;              /* MAIL: with SMTPUTF8 */
	bool eightbit;          /* MAIL: with BODY=8BITMIME */
	bool known;             /* RCPT: not to be stored for again */
};

enum bsmtp_end {                /* how a session came to its end */
	BSMTP_END_OPEN,         /* it has not */
	BSMTP_END_QUIT,
	BSMTP_END_EOF,
	BSMTP_END_TIMEOUT,
	BSMTP_END_REFUSED,
	BSMTP_END_ERROR,
	BSMTP_ENDS
};
const char *bsmtp_end_name(enum bsmtp_end end);

struct bsmtp_server {           /* complete, to be embedded; fields are private */
	struct bsmtp_server_config *config;
	void *tap_context, *judge_context;      /* set by the caller after init */
	struct bsmtp_held *held;
	size_t held_size;
	uint64_t held_first, held_next;         /* tickets */
	unsigned char state;
	unsigned char hello;            /* enum bsmtp_verb of the opening, or 0 */
	unsigned char end;              /* enum bsmtp_end */
	unsigned char flags;            /* BSMTP_PEER_ bits */
	bool streams;                   /* BSMTP was said: bodies may come blind */
	bool authed;
	unsigned char auth_step;
	uint64_t auth_ticket;
	bool mail_tried, mail_ok, utf8; /* of the transaction under way */
	bool oversize;                  /* it says that it is larger than it may be */
	bool chunks, last;              /* BDAT has begun it; this one ends it */
	bool resumed;                   /* a delay is over: no fault twice */
	bool aborting;                  /* ABORT is the next event */
	bool dropped;
	unsigned rcpts, rcpts_new;      /* those taken; of them, not known before */
	unsigned short verdict;         /* why the body is refused; 0: it is not */
	uint64_t verdict_argument;
	uint64_t chunk;                 /* octets of it still to come */
	uint64_t size, wire;            /* octets of the body, and of this framing */
	struct bsmtp_decoder decoder;
	struct bsmtp_newlines newlines;
	size_t line_len;
	char line[BSMTP_COMMAND_MAX];
	size_t name_len;                /* of the name that AUTH LOGIN was told */
	char name[256];
};

enum {                          /* what is known of the peer */
	BSMTP_PEER_ALLOWED = 1,         /* it may speak, BSMTP too */
	BSMTP_PEER_GUEST = 2,           /* it may yet show who it is, by TLS or AUTH */
	BSMTP_PEER_LOCAL = 4,           /* a local socket: AUTH needs no TLS there */
	BSMTP_PEER_TLS = 8,             /* TLS from the first octet */
	BSMTP_PEER_EARLY = 16           /* what it says now may be somebody's replay:
	                                 * TLS early data, octets in a SYN */
};

/* Begins a session; the greeting is queued.  `flags` are BSMTP_PEER_ bits: a peer
 * that is neither allowed nor a guest is refused.  `held` is memory for held_size
 * replies, at least BSMTP_SERVER_HELD_MIN. */
enum { BSMTP_SERVER_HELD_MIN = 8 };
void bsmtp_server_init(struct bsmtp_server *server, struct bsmtp_server_config *config,
    unsigned flags, struct bsmtp_held *held, size_t held_size);

/* TLS is established behind STARTTLS: the session begins anew, without a greeting
 * (RFC 3207 4.2); `flags` are what is known now. */
void bsmtp_server_secured(struct bsmtp_server *server, unsigned flags);

/* Early data is over, or begins: MAIL in it needs a TRANSID, for what comes twice
 * must not be stored twice (RFC 8446 8). */
void bsmtp_server_early(struct bsmtp_server *server, bool early);

/* Moves the replies owed to other memory, of held_size places: at least as many
 * as bsmtp_server_owed() and the minimum. */
void bsmtp_server_lend(struct bsmtp_server *server, struct bsmtp_held *held, size_t held_size);
size_t bsmtp_server_owed(const struct bsmtp_server *server);

/* Octets received: reads from in[0..len), returns the octets used, and fills
 * *event.  Call again with the rest, and after any event but MORE, FULL, DELAY
 * and END also with none left. */
size_t bsmtp_server_in(struct bsmtp_server *server, const char *in, size_t len,
    struct bsmtp_server_event *event);

/* The verdict on a message, by its ticket. */
void bsmtp_server_settle(struct bsmtp_server *server, uint64_t ticket, enum bsmtp_answer answer);

/* Writes replies that may go to out[0..cap), whole ones only, returns their
 * octets.  A cap of BSMTP_SERVER_OUT_MIN has room for any.  *closed is set when
 * the connection is to be dropped behind them, without more ado. */
enum { BSMTP_SERVER_OUT_MIN = 2 * BSMTP_COMMAND_MAX };
size_t bsmtp_server_out(struct bsmtp_server *server, char *out, size_t cap, bool *closed);

/* The peer closed, or the caller ends the session with an answer, which is sent
 * behind the replies owed.  A message under way is forgotten: *event is ABORT
 * if there was one, else END. */
void bsmtp_server_eof(struct bsmtp_server *server, struct bsmtp_server_event *event);
void bsmtp_server_stop(struct bsmtp_server *server, enum bsmtp_answer answer,
    struct bsmtp_server_event *event);

enum bsmtp_end bsmtp_server_end(const struct bsmtp_server *server);

/* BSMTP_VERB_BSMTP, EHLO or HELO; BSMTP_VERB_CONNECT before any. */
enum bsmtp_verb bsmtp_server_hello(const struct bsmtp_server *server);

#endif
