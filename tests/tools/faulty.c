/* faulty.c - stands between a program and libc, and makes single calls go wrong.
 *
 *	cc -O1 -shared -fPIC -o faulty.so faulty.c -ldl -lpthread
 *	FAULTY_ROOT=/folder FAULTY_PLAN=fsync@box#2=kill LD_PRELOAD=./faulty.so program
 *
 * A place is a call on a file below the folder, or one about processes.  It has two
 * names: its number, #N of all places of the run, and KIND@CLASS#K, the K-th of its
 * kind on a file of its class.  The class is the path below the folder; digits are
 * written as one 0, names with a time in them as a star.
 *
 *	FAULTY_ROOT	the folder, absolute; without it all of this file does nothing
 *	FAULTY_PLAN	RULE[;RULE]..., a RULE being PLACE[+[N]]=ACTION.  With +N the action
 *			is that of the place and of the next calls that can fail so, N in
 *			all; with + alone, of all of them.  The place mem#K is the K-th
 *			allocation once the program first waits for something.
 *	    kill	SIGKILL before the call; after: behind it
 *	    tear:N	only N octets are written, then SIGKILL; tear:N% likewise
 *	    short:N	only N octets (or N%) are written or read, and that is returned
 *	    ENOSPC...	the call is not made, and fails so
 *	    lie:EIO...	the call is made, and its failure reported all the same
 *	FAULTY_LOG	a file for what happened; FAULTY_LEVEL: 0 the rules that came true,
 *			1 each place, 2 also the data
 *	FAULTY_SWALLOW	patterns with colons between: syncs that are left out though they
 *			are reported done; of f/PATH for a file, d/PATH for a folder, s/ for
 *			syncfs
 *	FAULTY_SYNC	not empty: syncs are made.  Else they are left out, which a killed
 *			process cannot tell from those that are made
 *	FAULTY_TURNS	not empty: of the threads one runs at a time, until it waits.  So the
 *			order of places is the same in each run.  LATE in the log: a thread has
 *			waited for its turn in vain, for the program waits in a way that is not
 *			known here
 *	FAULTY_INHERIT	not empty: what the program starts has this shim too
 *
 * The log has a line for each place, its fields behind tabs: number, kind, class, K,
 * result, errno, two numbers, two paths, how many octets of data; these and a line
 * end follow.  For 64-bit systems with glibc.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* What can go wrong with a call, for the calls that follow the first of a rule. */
enum {
	DATA = 1,               /* needs room on the disk */
	NAME = 2,               /* makes or moves a name */
	LESS = 4,               /* removes a name, cuts a file */
	SYNC = 8,
	READ = 16,
	OPEN = 32,              /* takes a descriptor */
	STAT = 64,
	LOCK = 128,
	PROC = 256,
	DOOR = 512              /* a socket */
};

static const struct { const char *name; int number; int can; } errors[] = {
	{ "ENOSPC", ENOSPC, DATA | NAME | SYNC }, { "EDQUOT", EDQUOT, DATA | NAME | SYNC },
	{ "EIO", EIO, DATA | NAME | LESS | SYNC | READ | OPEN },
	{ "EACCES", EACCES, NAME | LESS | OPEN }, { "EROFS", EROFS, NAME | LESS },
	{ "EMFILE", EMFILE, OPEN }, { "ENFILE", ENFILE, OPEN },
	{ "ENOMEM", ENOMEM, NAME | OPEN | STAT | PROC | LOCK },
	{ "EINTR", EINTR, DATA | READ | LOCK | PROC }, { "EAGAIN", EAGAIN, LOCK | PROC },
	{ "ENOLCK", ENOLCK, LOCK }, { "ENOENT", ENOENT, NAME | LESS }, { "EEXIST", EEXIST, NAME },
	{ "ECHILD", ECHILD, PROC }, { "EFBIG", EFBIG, DATA },
};

enum action { KILL, AFTER, TEAR, SHORT, FAIL, LIE };

struct rule {
	unsigned long number;           /* of all, or 0 */
	char kind[40], class[256];
	unsigned long k;
	long span;                      /* how many calls; -1: all */
	enum action action;
	int error, can;
	long part;
	bool percent, begun;
};

/* What the call that is being made comes to. */
struct fate {
	enum { MADE, FAILS, IN_PART } how;
	int error, lie;
	size_t part;
	bool killed;                    /* behind it */
	bool here;                      /* it is a place */
	unsigned long number, k;
	const char *kind;
	char class[256];
};

enum { FDS = 8192, RULES = 16, COUNTERS = 1024 };

static bool on, logging, with_calls, with_data, syncing, turning, armed;
static char root[PATH_MAX];
static size_t root_len;
static int log_fd = -1;
static char *swallow;
static struct rule rules[RULES];
static int rule_count;
static unsigned long places, allocations;
static struct { char *path; bool dir, socket; } fds[FDS];
static struct { char kind[40], class[256]; unsigned long count; } counters[COUNTERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;             /* in this file: nothing counts */

/* ---- the calls themselves ---- */

static void *next_of(const char *name)
{
	void *at = dlsym(RTLD_NEXT, name);

	if (at == NULL) {
		static const char text[] = "faulty: a call is missing in libc\n";
		(void)!syscall(SYS_write, 2, text, sizeof text - 1);
		_exit(70);
	}
	return at;
}

#define NEXT(type, name, ...) \
	static type (*next)(__VA_ARGS__); \
	if (next == NULL) \
		next = (type (*)(__VA_ARGS__))next_of(name)

static long raw_write(int fd, const void *at, size_t len)
{
	return syscall(SYS_write, fd, at, len);
}

static void die(void)
{
	(void)syscall(SYS_kill, getpid(), SIGKILL);
	for (;;)
		(void)pause();
}

static void take_lock(void)
{
	NEXT(int, "pthread_mutex_lock", pthread_mutex_t *);
	inside++;
	(void)next(&lock);
}

static void drop_lock(void)
{
	NEXT(int, "pthread_mutex_unlock", pthread_mutex_t *);
	(void)next(&lock);
	inside--;
}

/* ---- paths and classes ---- */

static bool below(const char *path)
{
	return path != NULL && strncmp(path, root, root_len) == 0 &&
	    (path[root_len] == '/' || path[root_len] == '\0');
}

/* An absolute path, without double strokes and "./"; false where there is none. */
static bool resolve(char *out, int dir, const char *path)
{
	char whole[2 * PATH_MAX];
	size_t n = 0;

	if (path == NULL)
		return false;
	if (path[0] == '/') {
		snprintf(whole, sizeof whole, "%s", path);
	} else if (dir == AT_FDCWD) {
		char here[PATH_MAX];
		if (syscall(SYS_getcwd, here, sizeof here) < 0)
			return false;
		snprintf(whole, sizeof whole, "%s/%s", here, path);
	} else {
		if (dir < 0 || dir >= FDS || fds[dir].path == NULL)
			return false;
		snprintf(whole, sizeof whole, "%s/%s", fds[dir].path, path);
	}
	for (const char *p = whole; *p != '\0' && n < PATH_MAX - 1; p++) {
		if (p[0] == '/' && (p[1] == '/' || p[1] == '\0'))
			continue;
		if (p[0] == '/' && p[1] == '.' && (p[2] == '/' || p[2] == '\0')) {
			p++;
			continue;
		}
		out[n++] = *p;
	}
	out[n] = '\0';
	return true;
}

static bool has_digit(const char *at, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (at[i] >= '0' && at[i] <= '9')
			return true;
	return false;
}

static void classify(char *out, size_t size, const char *path)
{
	const char *p;
	size_t n = 0;

	if (path == NULL) {
		snprintf(out, size, "process");
		return;
	}
	p = path + root_len;
	while (*p == '/')
		p++;
	if (*p == '\0') {
		snprintf(out, size, ".");
		return;
	}
	while (*p != '\0' && n + 2 < size) {
		size_t len = strcspn(p, "/");
		if (len > 15 && has_digit(p, len)) {
			out[n++] = '*';
			p += len;
		}
		for (; *p != '\0' && *p != '/' && n + 2 < size; p++) {
			bool digit = *p >= '0' && *p <= '9';
			if (!digit || n == 0 || out[n - 1] != '0')
				out[n++] = digit ? '0' : *p;
		}
		if (*p == '/' && n + 2 < size) {
			out[n++] = '/';
			p++;
		}
	}
	out[n] = '\0';
}

static const char *path_of(int fd)
{
	return fd >= 0 && fd < FDS && !fds[fd].socket ? fds[fd].path : NULL;
}

static bool is_door(int fd)
{
	return on && fd >= 0 && fd < FDS && fds[fd].socket;
}

static void fd_is(int fd, const char *path, bool dir)
{
	if (fd < 0 || fd >= FDS)
		return;
	free(fds[fd].path);
	fds[fd].path = path != NULL ? strdup(path) : NULL;
	fds[fd].dir = dir;
	fds[fd].socket = false;
}

/* ---- rules ---- */

static int error_of(const char *name, int *can)
{
	for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
		if (strcmp(errors[i].name, name) == 0) {
			*can = errors[i].can;
			return errors[i].number;
		}
	fprintf(stderr, "faulty: no such error: %s\n", name);
	exit(64);
}

static void read_part(struct rule *r, const char *text)
{
	char *end;

	r->part = strtol(text, &end, 10);
	r->percent = *end == '%';
}

static void read_rule(char *text)
{
	struct rule *r = &rules[rule_count];
	char *action = strrchr(text, '='), *hash, *at, *plus;

	if (rule_count == RULES || action == NULL)
		goto bad;
	*action++ = '\0';
	hash = strrchr(text, '#');
	if (hash == NULL)
		goto bad;
	*hash++ = '\0';
	plus = strchr(hash, '+');
	r->span = plus == NULL ? 1 : plus[1] == '\0' ? -1 : strtol(plus + 1, NULL, 10);
	at = strchr(text, '@');
	if (at != NULL) {
		*at++ = '\0';
		snprintf(r->class, sizeof r->class, "%s", at);
	}
	snprintf(r->kind, sizeof r->kind, "%s", text);
	if (text[0] == '\0')
		r->number = strtoul(hash, NULL, 10);
	else
		r->k = strtoul(hash, NULL, 10);
	if (strcmp(action, "kill") == 0) {
		r->action = KILL;
	} else if (strcmp(action, "after") == 0) {
		r->action = AFTER;
	} else if (strncmp(action, "tear:", 5) == 0) {
		r->action = TEAR;
		read_part(r, action + 5);
	} else if (strncmp(action, "short:", 6) == 0) {
		r->action = SHORT;
		read_part(r, action + 6);
	} else if (strncmp(action, "lie:", 4) == 0) {
		r->action = LIE;
		r->error = error_of(action + 4, &r->can);
	} else {
		r->action = FAIL;
		r->error = error_of(action, &r->can);
	}
	rule_count++;
	return;
bad:
	fprintf(stderr, "faulty: no rule: %s\n", text);
	exit(64);
}

static bool rule_holds(struct rule *r, const struct fate *f, int can)
{
	bool here = r->number > 0 ? r->number == f->number :
	    r->k == f->k && strcmp(r->kind, f->kind) == 0 && strcmp(r->class, f->class) == 0;

	if (here)
		r->begun = true;
	else if (!r->begun || r->span == 0 || (r->can & can) == 0)
		return false;
	if (r->span == 0)
		return false;
	if (r->span > 0)
		r->span--;
	return true;
}

static unsigned long count_of(const char *kind, const char *class)
{
	for (int i = 0; i < COUNTERS; i++) {
		if (counters[i].count == 0) {
			snprintf(counters[i].kind, sizeof counters[i].kind, "%s", kind);
			snprintf(counters[i].class, sizeof counters[i].class, "%s", class);
		}
		if (strcmp(counters[i].kind, kind) == 0 && strcmp(counters[i].class, class) == 0)
			return ++counters[i].count;
	}
	return 0;
}

/* ---- the log ---- */

static void put_line(const struct fate *f, const char *kind, const char *class, long result,
    int error, long a, long b, const char *one, const char *two, const struct iovec *data,
    int parts, size_t len)
{
	char line[3 * PATH_MAX];
	int n;

	if (!with_data)
		len = 0;
	n = snprintf(line, sizeof line, "%lu\t%s\t%s\t%lu\t%ld\t%d\t%ld\t%ld\t%s\t%s\t%zu\n",
	    f->number, kind, class, f->k, result, error, a, b, one != NULL ? one : "",
	    two != NULL ? two : "", len);
	(void)raw_write(log_fd, line, (size_t)n);
	for (int i = 0; i < parts && len > 0; i++) {
		size_t piece = data[i].iov_len < len ? data[i].iov_len : len;
		const char *at = data[i].iov_base;
		len -= piece;
		while (piece > 0) {
			long did = raw_write(log_fd, at, piece);
			if (did <= 0)
				return;
			at += did;
			piece -= (size_t)did;
		}
		if (len == 0)
			(void)raw_write(log_fd, "\n", 1);
	}
}

static void put_hit(const struct fate *f, const char *what)
{
	if (logging)
		put_line(f, "HIT", what, 0, 0, 0, 0, f->kind, f->class, NULL, 0, 0);
}

/* ---- a place ---- */

/* Takes the lock; leave() drops it.  `path` is NULL for what is about processes. */
static struct fate arrive(const char *kind, const char *path, size_t len, int can)
{
	struct fate f = { .how = MADE, .kind = kind };
	int saved = errno;

	take_lock();
	if (!on || (path != NULL && !below(path) && (can & DOOR) == 0)) {
		errno = saved;
		return f;
	}
	f.here = true;
	f.number = ++places;
	if ((can & DOOR) != 0)
		snprintf(f.class, sizeof f.class, "socket");
	else
		classify(f.class, sizeof f.class, path);
	f.k = count_of(kind, f.class);
	for (int i = 0; i < rule_count; i++) {
		struct rule *r = &rules[i];
		if (!rule_holds(r, &f, can))
			continue;
		f.part = r->percent ? len * (size_t)r->part / 100 : (size_t)r->part;
		if (f.part > len)
			f.part = len;
		switch (r->action) {
		case KILL:
			put_hit(&f, "kill");
			die();
			break;
		case AFTER:
			put_hit(&f, "after");
			f.killed = true;
			break;
		case TEAR:
			put_hit(&f, "tear");
			if (f.part == 0)
				die();
			f.how = IN_PART;
			f.killed = true;
			break;
		case SHORT:
			put_hit(&f, "short");
			if (f.part > 0)
				f.how = IN_PART;
			break;
		case FAIL:
			put_hit(&f, "fail");
			f.how = FAILS;
			f.error = r->error;
			break;
		case LIE:
			put_hit(&f, "lie");
			f.lie = r->error;
			break;
		}
		break;
	}
	errno = saved;
	return f;
}

/* Behind the call: the result, which a lie makes -1. */
static long leave_with(struct fate *f, long result, long a, long b, const char *one,
    const char *two, const struct iovec *data, int parts, size_t len)
{
	int saved = f->how == FAILS ? f->error : errno;

	if (f->here && with_calls)
		put_line(f, f->kind, f->class, result, result < 0 ? saved : 0, a, b, one, two, data,
		    parts, len);
	if (f->killed)
		die();
	if (f->here && f->lie != 0 && result >= 0) {
		result = -1;
		saved = f->lie;
	}
	drop_lock();
	errno = saved;
	return result;
}

static long leave(struct fate *f, long result, long a, long b, const char *one, const char *two)
{
	return leave_with(f, result, a, b, one, two, NULL, 0, 0);
}

/* A line that is no place. */
static void note(const char *kind, long a, const char *one, const void *data, size_t len)
{
	struct fate f = { .number = 0 };
	struct iovec piece = { (void *)(size_t)data, len };

	if (logging && (with_calls || strcmp(kind, "LATE") == 0))
		put_line(&f, kind, "-", 0, 0, a, 0, one, NULL, &piece, 1, len);
}

/* ---- turns ---- */

/* One thread has the turn.  Who waits for something gives it away before; the thread
 * that polls goes on only when no other can. */
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_free = PTHREAD_COND_INITIALIZER;
static bool turn_taken;
static int turn_owed;           /* threads that were woken, and have not had it since */
static struct { void *cond; int waiting, woken; } conds[64];
static __thread bool my_turn;
static bool main_waits;

static int real_lock(pthread_mutex_t *m)
{
	NEXT(int, "pthread_mutex_lock", pthread_mutex_t *);
	return next(m);
}

static int real_unlock(pthread_mutex_t *m)
{
	NEXT(int, "pthread_mutex_unlock", pthread_mutex_t *);
	return next(m);
}

static void *cond_call(const char *name)
{
	void *at = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");

	return at != NULL ? at : next_of(name);
}

static int real_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
	static int (*next)(pthread_cond_t *, pthread_mutex_t *);
	if (next == NULL)
		next = (int (*)(pthread_cond_t *, pthread_mutex_t *))cond_call("pthread_cond_wait");
	return next(c, m);
}

static int real_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until)
{
	static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
	if (next == NULL)
		next = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))
		    cond_call("pthread_cond_timedwait");
	return next(c, m, until);
}

static int real_broadcast(pthread_cond_t *c)
{
	static int (*next)(pthread_cond_t *);
	if (next == NULL)
		next = (int (*)(pthread_cond_t *))cond_call("pthread_cond_broadcast");
	return next(c);
}

static int real_signal(pthread_cond_t *c)
{
	static int (*next)(pthread_cond_t *);
	if (next == NULL)
		next = (int (*)(pthread_cond_t *))cond_call("pthread_cond_signal");
	return next(c);
}

static void until_in(struct timespec *t, long ms)
{
	(void)syscall(SYS_clock_gettime, CLOCK_REALTIME, t);
	t->tv_nsec += ms % 1000 * 1000000;
	t->tv_sec += ms / 1000 + t->tv_nsec / 1000000000;
	t->tv_nsec %= 1000000000;
}

static void give_turn(void)
{
	if (!turning || !my_turn)
		return;
	real_lock(&turn_lock);
	my_turn = false;
	turn_taken = false;
	real_broadcast(&turn_free);
	real_unlock(&turn_lock);
}

/* `last`: only when no other thread wants it.  Nothing is waited for without end: a
 * program that waits in a way that is not known here loses its order, not its life. */
static void await_turn(bool last, bool take)
{
	struct timespec until;
	int saved = errno;
	bool late = false;

	if (!turning || my_turn)
		return;
	until_in(&until, 2000);
	real_lock(&turn_lock);
	while (turn_taken || (last && turn_owed > 0))
		if (real_timedwait(&turn_free, &turn_lock, &until) != 0) {
			if (last)
				turn_owed = 0;
			late = true;
			break;
		}
	if (take)
		my_turn = turn_taken = true;
	real_unlock(&turn_lock);
	if (late) {
		take_lock();
		note("LATE", 0, NULL, NULL, 0);
		drop_lock();
	}
	errno = saved;
}

static void owe(int count)
{
	real_lock(&turn_lock);
	turn_owed += count;
	if (turn_owed < 0)
		turn_owed = 0;
	real_broadcast(&turn_free);
	real_unlock(&turn_lock);
}

static int cond_place(void *c)
{
	int i = 0;

	while (i < 63 && conds[i].cond != NULL && conds[i].cond != c)
		i++;
	conds[i].cond = c;
	return i;
}

static void cond_begins(void *c)
{
	real_lock(&turn_lock);
	conds[cond_place(c)].waiting++;
	real_unlock(&turn_lock);
}

static void cond_ends(void *c)
{
	int i;

	real_lock(&turn_lock);
	i = cond_place(c);
	conds[i].waiting--;
	if (conds[i].woken > 0) {
		conds[i].woken--;
		if (turn_owed > 0)
			turn_owed--;
	}
	real_unlock(&turn_lock);
}

static void cond_wakes(void *c, bool all)
{
	int i, more;

	real_lock(&turn_lock);
	i = cond_place(c);
	more = conds[i].waiting - conds[i].woken;
	if (!all && more > 1)
		more = 1;
	if (more > 0) {
		conds[i].woken += more;
		turn_owed += more;
	}
	real_unlock(&turn_lock);
}

int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
	int done;

	if (!turning || inside)
		return real_wait(c, m);
	cond_begins(c);
	give_turn();
	done = real_wait(c, m);
	real_unlock(m);                 /* it may be for nothing: the caller looks again */
	await_turn(false, true);
	cond_ends(c);
	real_lock(m);
	return done;
}

int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until)
{
	int done;

	if (!turning || inside)
		return real_timedwait(c, m, until);
	cond_begins(c);
	give_turn();
	done = real_timedwait(c, m, until);
	real_unlock(m);
	await_turn(false, true);
	cond_ends(c);
	real_lock(m);
	return done;
}

int pthread_cond_signal(pthread_cond_t *c)
{
	if (turning && !inside)
		cond_wakes(c, false);
	return real_signal(c);
}

int pthread_cond_broadcast(pthread_cond_t *c)
{
	if (turning && !inside)
		cond_wakes(c, true);
	return real_broadcast(c);
}

struct start {
	void *(*run)(void *);
	void *context;
};

static void *run_thread(void *context)
{
	struct start s = *(struct start *)context;
	void *result;

	free(context);
	await_turn(false, true);
	owe(-1);
	result = s.run(s.context);
	give_turn();
	return result;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *),
    void *context)
{
	NEXT(int, "pthread_create", pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
	struct start *s;
	int done;

	if (!turning)
		return next(thread, how, run, context);
	inside++;
	s = malloc(sizeof *s);
	inside--;
	s->run = run;
	s->context = context;
	owe(1);
	done = next(thread, how, run_thread, s);
	if (done != 0)
		owe(-1);
	return done;
}

int pthread_join(pthread_t thread, void **result)
{
	NEXT(int, "pthread_join", pthread_t, void **);
	bool had = my_turn;
	int done;

	give_turn();
	done = next(thread, result);
	if (had)
		await_turn(true, true);
	return done;
}

/* The first wait for something from outside: the program is ready. */
static void waits(void)
{
	if (!on || main_waits)
		return;
	take_lock();
	main_waits = true;
	armed = true;
	note("ready", 0, NULL, NULL, 0);
	drop_lock();
}

#define WAITING(call) do { \
		bool had_ = my_turn; \
		give_turn(); \
		await_turn(true, false); \
		done = call; \
		if (had_) \
			await_turn(true, true); \
	} while (0)

int poll(struct pollfd *at, nfds_t count, int ms)
{
	NEXT(int, "poll", struct pollfd *, nfds_t, int);
	int done;

	waits();
	WAITING(next(at, count, ms));
	return done;
}

int ppoll(struct pollfd *at, nfds_t count, const struct timespec *time, const sigset_t *mask)
{
	NEXT(int, "ppoll", struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);
	int done;

	waits();
	WAITING(next(at, count, time, mask));
	return done;
}

int epoll_wait(int fd, struct epoll_event *at, int count, int ms)
{
	NEXT(int, "epoll_wait", int, struct epoll_event *, int, int);
	int done;

	waits();
	WAITING(next(fd, at, count, ms));
	return done;
}

int epoll_pwait(int fd, struct epoll_event *at, int count, int ms, const sigset_t *mask)
{
	NEXT(int, "epoll_pwait", int, struct epoll_event *, int, int, const sigset_t *);
	int done;

	waits();
	WAITING(next(fd, at, count, ms, mask));
	return done;
}

int select(int n, fd_set *r, fd_set *w, fd_set *e, struct timeval *time)
{
	NEXT(int, "select", int, fd_set *, fd_set *, fd_set *, struct timeval *);
	int done;

	waits();
	WAITING(next(n, r, w, e, time));
	return done;
}

int nanosleep(const struct timespec *time, struct timespec *left)
{
	NEXT(int, "nanosleep", const struct timespec *, struct timespec *);
	bool had = my_turn;
	int done;

	give_turn();
	done = next(time, left);
	if (had)
		await_turn(false, true);
	return done;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *time, struct timespec *left)
{
	NEXT(int, "clock_nanosleep", clockid_t, int, const struct timespec *, struct timespec *);
	bool had = my_turn;
	int done;

	give_turn();
	done = next(clock, flags, time, left);
	if (had)
		await_turn(false, true);
	return done;
}

int usleep(useconds_t us)
{
	struct timespec time = { us / 1000000, (long)(us % 1000000) * 1000 };

	return nanosleep(&time, NULL);
}

/* ---- opening ---- */

static int opened(int dir, const char *path, int flags, mode_t mode)
{
	NEXT(int, "openat64", int, const char *, int, ...);
	bool unnamed = (flags & O_TMPFILE) == O_TMPFILE;
	char at[PATH_MAX];
	struct fate f;
	int fd;

	if (!on || inside || !resolve(at, dir, path) || !below(at))
		return next(dir, path, flags, mode);
	f = arrive((flags & O_CREAT) != 0 || unnamed ? "create" : "open", at, 0,
	    OPEN | ((flags & O_CREAT) != 0 ? NAME : 0));
	fd = f.how == FAILS ? -1 : next(dir, path, flags, mode);
	if (fd >= 0)
		fd_is(fd, unnamed ? strcat(at, "/?") : at, (flags & O_DIRECTORY) != 0 && !unnamed);
	if (fd >= 0 && f.lie != 0) {
		(void)syscall(SYS_close, fd);
		fd_is(fd, NULL, false);
	}
	return (int)leave(&f, fd, flags, 0, at, NULL);
}

#define OPEN_MODE(flags, mode) do { \
		va_list arguments; \
		va_start(arguments, flags); \
		mode = (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) != 0 ? \
		    (mode_t)va_arg(arguments, int) : 0; \
		va_end(arguments); \
	} while (0)

int open(const char *path, int flags, ...)
{
	mode_t mode;

	OPEN_MODE(flags, mode);
	return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	mode_t mode;

	OPEN_MODE(flags, mode);
	return opened(AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...)
{
	mode_t mode;

	OPEN_MODE(flags, mode);
	return opened(dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...)
{
	mode_t mode;

	OPEN_MODE(flags, mode);
	return opened(dir, path, flags, mode);
}

/* The names that _FORTIFY_SOURCE makes of them. */
int __open_2(const char *path, int flags);
int __open_2(const char *path, int flags)
{
	return opened(AT_FDCWD, path, flags, 0);
}

int __open64_2(const char *path, int flags);
int __open64_2(const char *path, int flags)
{
	return opened(AT_FDCWD, path, flags, 0);
}

int __openat_2(int dir, const char *path, int flags);
int __openat_2(int dir, const char *path, int flags)
{
	return opened(dir, path, flags, 0);
}

int __openat64_2(int dir, const char *path, int flags);
int __openat64_2(int dir, const char *path, int flags)
{
	return opened(dir, path, flags, 0);
}

int creat(const char *path, mode_t mode)
{
	return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat64(const char *path, mode_t mode)
{
	return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* What stdio does to a file is not seen here; who uses it there must be told. */
static FILE *fopened(const char *path, const char *how)
{
	NEXT(FILE *, "fopen64", const char *, const char *);
	char at[PATH_MAX];

	if (on && !inside && resolve(at, AT_FDCWD, path) && below(at) &&
	    strpbrk(how, "wa+") != NULL) {
		take_lock();
		note("UNSEEN", 0, at, NULL, 0);
		drop_lock();
	}
	return next(path, how);
}

FILE *fopen(const char *path, const char *how)
{
	return fopened(path, how);
}

FILE *fopen64(const char *path, const char *how)
{
	return fopened(path, how);
}

int close(int fd)
{
	NEXT(int, "close", int);
	char at[PATH_MAX];
	struct fate f;
	int done;

	if (is_door(fd)) {
		take_lock();
		note("hangup", fd, NULL, NULL, 0);
		fds[fd].socket = false;
		drop_lock();
		return next(fd);
	}
	if (!on || inside || path_of(fd) == NULL)
		return next(fd);
	snprintf(at, sizeof at, "%s", path_of(fd));
	f = arrive("close", at, 0, 0);
	done = next(fd);                /* it is closed in any case, as on Linux */
	fd_is(fd, NULL, false);
	if (f.how == FAILS)
		done = -1;
	return (int)leave(&f, done, fd, 0, at, NULL);
}

static void same_file(int from, int to)
{
	if (!on || to < 0 || to >= FDS || from < 0 || from >= FDS)
		return;
	take_lock();
	fd_is(to, fds[from].path, fds[from].dir);
	fds[to].socket = fds[from].socket;
	if (fds[from].path != NULL)
		note("dup", from, fds[from].path, &to, sizeof to);
	drop_lock();
}

int dup(int fd)
{
	NEXT(int, "dup", int);
	int done = next(fd);

	same_file(fd, done);
	return done;
}

int dup2(int fd, int to)
{
	NEXT(int, "dup2", int, int);
	int done = next(fd, to);

	if (fd != to)
		same_file(fd, done);
	return done;
}

/* ---- reading and writing ---- */

static size_t size_of(const struct iovec *v, int count)
{
	size_t len = 0;

	for (int i = 0; i < count; i++)
		len += v[i].iov_len;
	return len;
}

static ssize_t raw_writev(int fd, const struct iovec *v, int count, off_t at)
{
	return at < 0 ? (ssize_t)syscall(SYS_writev, fd, v, count) :
	    (ssize_t)syscall(SYS_pwritev, fd, v, count, at, 0L);
}

static ssize_t raw_read(int fd, void *at, size_t len, off_t where)
{
	return where < 0 ? (ssize_t)syscall(SYS_read, fd, at, len) :
	    (ssize_t)syscall(SYS_pread64, fd, at, len, where);
}

/* All that writes: `at` is -1 where the file's own place counts. */
static ssize_t wrote(int fd, const struct iovec *v, int count, off_t at)
{
	size_t len = size_of(v, count);
	bool door = is_door(fd);
	struct fate f;
	ssize_t n;
	off_t to = at;

	if (!on || inside || (!door && path_of(fd) == NULL))
		return raw_writev(fd, v, count, at);
	f = arrive(door ? "send" : "write", path_of(fd), len, door ? DOOR : DATA);
	if (!door && at < 0) {
		bool appends = (syscall(SYS_fcntl, fd, F_GETFL) & O_APPEND) != 0;
		to = (off_t)syscall(SYS_lseek, fd, 0L, appends ? SEEK_END : SEEK_CUR);
	}
	if (f.how == FAILS) {
		n = -1;
	} else if (f.how == IN_PART) {
		/* One piece after the other; what is left of the part ends one of them. */
		size_t left = f.part;
		for (int i = 0; i < count && left > 0; i++) {
			size_t len_now = v[i].iov_len < left ? v[i].iov_len : left;
			struct iovec piece = { v[i].iov_base, len_now };
			ssize_t did = raw_writev(fd, &piece, 1, at < 0 ? -1 :
			    at + (off_t)(f.part - left));
			if (did <= 0)
				break;
			left -= (size_t)did;
		}
		n = (ssize_t)(f.part - left);
	} else {
		n = raw_writev(fd, v, count, at);
	}
	return leave_with(&f, n, fd, to, path_of(fd), NULL, v, count, n > 0 ? (size_t)n : 0);
}

ssize_t write(int fd, const void *at, size_t len)
{
	struct iovec v = { (void *)(size_t)at, len };

	return on && !inside && (is_door(fd) || path_of(fd) != NULL) ? wrote(fd, &v, 1, -1) :
	    raw_write(fd, at, len);
}

ssize_t writev(int fd, const struct iovec *v, int count)
{
	return wrote(fd, v, count, -1);
}

static ssize_t pwrote(int fd, const void *at, size_t len, off_t where)
{
	struct iovec v = { (void *)(size_t)at, len };

	return wrote(fd, &v, 1, where);
}

ssize_t pwrite(int fd, const void *at, size_t len, off_t where)
{
	return pwrote(fd, at, len, where);
}

ssize_t pwrite64(int fd, const void *at, size_t len, off64_t where)
{
	return pwrote(fd, at, len, where);
}

ssize_t pwritev(int fd, const struct iovec *v, int count, off_t where)
{
	return wrote(fd, v, count, where);
}

ssize_t pwritev64(int fd, const struct iovec *v, int count, off64_t where)
{
	return wrote(fd, v, count, where);
}

ssize_t send(int fd, const void *at, size_t len, int flags)
{
	NEXT(ssize_t, "send", int, const void *, size_t, int);
	struct iovec v = { (void *)(size_t)at, len };
	struct fate f;
	ssize_t n;

	if (!is_door(fd) || inside)
		return next(fd, at, len, flags);
	f = arrive("send", NULL, len, DOOR);
	n = f.how == FAILS ? -1 : next(fd, at, f.how == IN_PART ? f.part : len, flags);
	return leave_with(&f, n, fd, 0, NULL, NULL, &v, 1, n > 0 ? (size_t)n : 0);
}

ssize_t sendmsg(int fd, const struct msghdr *m, int flags)
{
	NEXT(ssize_t, "sendmsg", int, const struct msghdr *, int);
	struct fate f;
	ssize_t n;

	if (!is_door(fd) || inside)
		return next(fd, m, flags);
	f = arrive("send", NULL, size_of(m->msg_iov, (int)m->msg_iovlen), DOOR);
	n = f.how == FAILS ? -1 : next(fd, m, flags);
	return leave_with(&f, n, fd, 0, NULL, NULL, m->msg_iov, (int)m->msg_iovlen,
	    n > 0 ? (size_t)n : 0);
}

/* What came is a line in the log, no place: how it is cut up is the network's. */
static void came(int fd, const void *at, ssize_t n)
{
	int saved = errno;

	if (n > 0 && with_data) {
		take_lock();
		note("recv", fd, NULL, at, (size_t)n);
		drop_lock();
	}
	errno = saved;
}

static ssize_t got(int fd, void *at, size_t len, off_t where)
{
	struct fate f;
	ssize_t n;

	if (is_door(fd)) {
		n = raw_read(fd, at, len, -1);
		came(fd, at, n);
		return n;
	}
	if (!on || inside || path_of(fd) == NULL)
		return raw_read(fd, at, len, where);
	f = arrive("read", path_of(fd), len, READ);
	if (f.how == IN_PART)
		len = f.part;
	n = f.how == FAILS ? -1 : raw_read(fd, at, len, where);
	return leave(&f, n, fd, where, path_of(fd), NULL);
}

ssize_t read(int fd, void *at, size_t len)
{
	return got(fd, at, len, -1);
}

ssize_t pread(int fd, void *at, size_t len, off_t where)
{
	return got(fd, at, len, where);
}

ssize_t pread64(int fd, void *at, size_t len, off64_t where)
{
	return got(fd, at, len, where);
}

ssize_t __read_chk(int fd, void *at, size_t len, size_t room);
ssize_t __read_chk(int fd, void *at, size_t len, size_t room)
{
	return len > room ? (abort(), -1) : got(fd, at, len, -1);
}

ssize_t __pread_chk(int fd, void *at, size_t len, off_t where, size_t room);
ssize_t __pread_chk(int fd, void *at, size_t len, off_t where, size_t room)
{
	return len > room ? (abort(), -1) : got(fd, at, len, where);
}

ssize_t __pread64_chk(int fd, void *at, size_t len, off64_t where, size_t room);
ssize_t __pread64_chk(int fd, void *at, size_t len, off64_t where, size_t room)
{
	return len > room ? (abort(), -1) : got(fd, at, len, where);
}

ssize_t recv(int fd, void *at, size_t len, int flags)
{
	NEXT(ssize_t, "recv", int, void *, size_t, int);
	ssize_t n = next(fd, at, len, flags);

	if (is_door(fd) && (flags & MSG_PEEK) == 0)
		came(fd, at, n);
	return n;
}

static int accepted(int fd)
{
	int saved = errno;

	if (on && fd >= 0 && fd < FDS) {
		take_lock();
		fd_is(fd, NULL, false);
		fds[fd].socket = true;
		note("accept", fd, NULL, NULL, 0);
		drop_lock();
	}
	errno = saved;
	return fd;
}

int accept(int fd, struct sockaddr *restrict who, socklen_t *restrict len)
{
	NEXT(int, "accept", int, struct sockaddr *, socklen_t *);
	return accepted(next(fd, who, len));
}

int accept4(int fd, struct sockaddr *restrict who, socklen_t *restrict len, int flags)
{
	NEXT(int, "accept4", int, struct sockaddr *, socklen_t *, int);
	return accepted(next(fd, who, len, flags));
}

static off_t sought(int fd, off_t to, int whence)
{
	NEXT(off_t, "lseek", int, off_t, int);
	struct fate f;
	off_t done;

	if (!on || inside || path_of(fd) == NULL)
		return next(fd, to, whence);
	f = arrive("lseek", path_of(fd), 0, 0);
	done = f.how == FAILS ? -1 : next(fd, to, whence);
	return leave(&f, done, fd, to, path_of(fd), NULL);
}

off_t lseek(int fd, off_t to, int whence)
{
	return sought(fd, to, whence);
}

off64_t lseek64(int fd, off64_t to, int whence)
{
	return sought(fd, to, whence);
}

/* ---- syncs ---- */

static bool swallowed(const char *kind, const char *path, bool dir)
{
	char name[PATH_MAX + 2], pattern[256];

	if (swallow == NULL)
		return false;
	snprintf(name, sizeof name, "%s/%s", strcmp(kind, "syncfs") == 0 ? "s" : dir ? "d" : "f",
	    kind[0] == 's' || path[root_len] == '\0' ? "" : path + root_len + 1);
	for (const char *p = swallow; *p != '\0'; p += strcspn(p, ":"), p += *p == ':') {
		snprintf(pattern, sizeof pattern, "%.*s", (int)strcspn(p, ":"), p);
		if (fnmatch(pattern, name, 0) == 0)
			return true;
	}
	return false;
}

static int synced(const char *kind, int fd, int (*next)(int))
{
	struct fate f;
	int done = 0;

	if (!on || inside || path_of(fd) == NULL)
		return next(fd);
	f = arrive(kind, path_of(fd), 0, SYNC);
	if (f.here && swallowed(kind, path_of(fd), fds[fd].dir)) {
		put_line(&f, "HIT", "swallow", 0, 0, 0, 0, f.kind, f.class, NULL, 0, 0);
		f.kind = "swallow";
	} else if (f.how == FAILS) {
		done = -1;
	} else if (syncing) {
		done = next(fd);
	}
	return (int)leave(&f, done, fd, 0, path_of(fd), NULL);
}

int fsync(int fd)
{
	NEXT(int, "fsync", int);
	return synced("fsync", fd, next);
}

int fdatasync(int fd)
{
	NEXT(int, "fdatasync", int);
	return synced("fsync", fd, next);
}

int syncfs(int fd)
{
	NEXT(int, "syncfs", int);
	return synced("syncfs", fd, next);
}

int sync_file_range(int fd, off64_t at, off64_t len, unsigned flags)
{
	(void)fd, (void)at, (void)len, (void)flags;
	return 0;                       /* it promises nothing */
}

/* ---- names ---- */

static int renamed(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
	char one[PATH_MAX], two[PATH_MAX];
	struct fate f;
	long done;

	if (!on || inside || !resolve(one, from_dir, from) || !resolve(two, to_dir, to) ||
	    (!below(one) && !below(two)))
		return (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
	f = arrive("rename", below(two) ? two : one, 0, NAME);
	done = f.how == FAILS ? -1 : syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
	return (int)leave(&f, done, (long)flags, 0, one, two);
}

int rename(const char *from, const char *to)
{
	return renamed(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
	return renamed(from_dir, from, to_dir, to, 0);
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
	return renamed(from_dir, from, to_dir, to, flags);
}

/* A file without a name is linked by its descriptor. */
static int linked(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
	char one[PATH_MAX], two[PATH_MAX];
	int fd = -1;
	struct fate f;
	long done;

	if (!on || inside || !resolve(two, to_dir, to) || !below(two))
		return (int)syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
	if ((flags & AT_EMPTY_PATH) != 0 && from[0] == '\0')
		fd = from_dir;
	else if (sscanf(from, "/proc/self/fd/%d", &fd) != 1)
		fd = -1;
	if (!resolve(one, from_dir, from))
		one[0] = '\0';
	f = arrive("link", two, 0, NAME);
	done = f.how == FAILS ? -1 : syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
	return (int)leave(&f, done, fd, flags, one, two);
}

int link(const char *from, const char *to)
{
	return linked(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
	return linked(from_dir, from, to_dir, to, flags);
}

static int removed(int dir, const char *path, int flags)
{
	char at[PATH_MAX];
	struct fate f;
	long done;

	if (!on || inside || !resolve(at, dir, path) || !below(at))
		return (int)syscall(SYS_unlinkat, dir, path, flags);
	f = arrive("unlink", at, 0, LESS);
	done = f.how == FAILS ? -1 : syscall(SYS_unlinkat, dir, path, flags);
	return (int)leave(&f, done, flags, 0, at, NULL);
}

int unlink(const char *path)
{
	return removed(AT_FDCWD, path, 0);
}

int unlinkat(int dir, const char *path, int flags)
{
	return removed(dir, path, flags);
}

int rmdir(const char *path)
{
	return removed(AT_FDCWD, path, AT_REMOVEDIR);
}

int remove(const char *path)
{
	int done = removed(AT_FDCWD, path, 0);

	return done != 0 && errno == EISDIR ? removed(AT_FDCWD, path, AT_REMOVEDIR) : done;
}

static int made_dir(int dir, const char *path, mode_t mode)
{
	char at[PATH_MAX];
	struct fate f;
	long done;

	if (!on || inside || !resolve(at, dir, path) || !below(at))
		return (int)syscall(SYS_mkdirat, dir, path, mode);
	f = arrive("mkdir", at, 0, NAME);
	done = f.how == FAILS ? -1 : syscall(SYS_mkdirat, dir, path, mode);
	return (int)leave(&f, done, 0, 0, at, NULL);
}

int mkdir(const char *path, mode_t mode)
{
	return made_dir(AT_FDCWD, path, mode);
}

int mkdirat(int dir, const char *path, mode_t mode)
{
	return made_dir(dir, path, mode);
}

/* ---- lengths ---- */

static int cut(int fd, off_t to)
{
	struct fate f;
	long done;

	if (!on || inside || path_of(fd) == NULL)
		return (int)syscall(SYS_ftruncate, fd, to);
	f = arrive("ftruncate", path_of(fd), 0, LESS);
	done = f.how == FAILS ? -1 : syscall(SYS_ftruncate, fd, to);
	return (int)leave(&f, done, fd, to, path_of(fd), NULL);
}

int ftruncate(int fd, off_t to)
{
	return cut(fd, to);
}

int ftruncate64(int fd, off64_t to)
{
	return cut(fd, to);
}

static int cut_path(const char *path, off_t to)
{
	char at[PATH_MAX];
	struct fate f;
	long done;

	if (!on || inside || !resolve(at, AT_FDCWD, path) || !below(at))
		return (int)syscall(SYS_truncate, path, to);
	f = arrive("truncate", at, 0, LESS);
	done = f.how == FAILS ? -1 : syscall(SYS_truncate, path, to);
	return (int)leave(&f, done, 0, to, at, NULL);
}

int truncate(const char *path, off_t to)
{
	return cut_path(path, to);
}

int truncate64(const char *path, off64_t to)
{
	return cut_path(path, to);
}

static int reserved(int fd, int mode, off_t at, off_t len)
{
	struct fate f;
	long done;

	if (!on || inside || path_of(fd) == NULL)
		return (int)syscall(SYS_fallocate, fd, mode, at, len);
	f = arrive("fallocate", path_of(fd), 0, DATA);
	done = f.how == FAILS ? -1 : syscall(SYS_fallocate, fd, mode, at, len);
	return (int)leave(&f, done, fd, mode == 0 ? at + len : -1, path_of(fd), NULL);
}

int fallocate(int fd, int mode, off_t at, off_t len)
{
	return reserved(fd, mode, at, len);
}

int fallocate64(int fd, int mode, off64_t at, off64_t len)
{
	return reserved(fd, mode, at, len);
}

int posix_fallocate(int fd, off_t at, off_t len)
{
	return reserved(fd, 0, at, len) != 0 ? errno : 0;
}

int posix_fallocate64(int fd, off64_t at, off64_t len)
{
	return reserved(fd, 0, at, len) != 0 ? errno : 0;
}

/* These copy past us.  Whoever calls them has to do without on some systems anyway. */
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t len, unsigned flags)
{
	NEXT(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);

	if (!on || path_of(to) == NULL)
		return next(from, at, to, to_at, len, flags);
	errno = ENOSYS;
	return -1;
}

/* ---- looking ---- */

#define LOOKED(kind, path, call) do { \
		struct fate f_ = arrive(kind, path, 0, STAT); \
		int done_ = f_.how == FAILS ? -1 : (int)(call); \
		return (int)leave(&f_, done_, 0, 0, path, NULL); \
	} while (0)

static int looked_at(int fd, struct stat *s)
{
	NEXT(int, "fstat64", int, struct stat *);

	if (!on || inside || path_of(fd) == NULL)
		return next(fd, s);
	LOOKED("fstat", path_of(fd), next(fd, s));
}

int fstat(int fd, struct stat *s)
{
	return looked_at(fd, s);
}

int fstat64(int fd, struct stat64 *s)
{
	return looked_at(fd, (struct stat *)(void *)s);
}

static int looked_up(int dir, const char *path, struct stat *s, int flags)
{
	NEXT(int, "fstatat64", int, const char *, struct stat *, int);
	char at[PATH_MAX];

	if (!on || inside || !resolve(at, dir, path) || !below(at))
		return next(dir, path, s, flags);
	LOOKED("stat", at, next(dir, path, s, flags));
}

int stat(const char *path, struct stat *s)
{
	return looked_up(AT_FDCWD, path, s, 0);
}

int stat64(const char *path, struct stat64 *s)
{
	return looked_up(AT_FDCWD, path, (struct stat *)(void *)s, 0);
}

int lstat(const char *path, struct stat *s)
{
	return looked_up(AT_FDCWD, path, s, AT_SYMLINK_NOFOLLOW);
}

int lstat64(const char *path, struct stat64 *s)
{
	return looked_up(AT_FDCWD, path, (struct stat *)(void *)s, AT_SYMLINK_NOFOLLOW);
}

int fstatat(int dir, const char *path, struct stat *s, int flags)
{
	return looked_up(dir, path, s, flags);
}

int fstatat64(int dir, const char *path, struct stat64 *s, int flags)
{
	return looked_up(dir, path, (struct stat *)(void *)s, flags);
}

static int may(int dir, const char *path, int mode, int flags)
{
	NEXT(int, "faccessat", int, const char *, int, int);
	char at[PATH_MAX];

	if (!on || inside || !resolve(at, dir, path) || !below(at))
		return next(dir, path, mode, flags);
	LOOKED("access", at, next(dir, path, mode, flags));
}

int access(const char *path, int mode)
{
	return may(AT_FDCWD, path, mode, 0);
}

int faccessat(int dir, const char *path, int mode, int flags)
{
	return may(dir, path, mode, flags);
}

DIR *opendir(const char *path)
{
	NEXT(DIR *, "opendir", const char *);
	char at[PATH_MAX];
	struct fate f;
	DIR *dir;

	if (!on || inside || !resolve(at, AT_FDCWD, path) || !below(at))
		return next(path);
	f = arrive("opendir", at, 0, OPEN);
	dir = f.how == FAILS ? NULL : next(path);
	if (dir != NULL)
		fd_is(dirfd(dir), at, true);
	(void)leave(&f, dir != NULL ? 0 : -1, dir != NULL ? dirfd(dir) : -1, 0, at, NULL);
	return dir;
}

DIR *fdopendir(int fd)
{
	NEXT(DIR *, "fdopendir", int);
	struct fate f;
	DIR *dir;

	if (!on || inside || path_of(fd) == NULL)
		return next(fd);
	f = arrive("opendir", path_of(fd), 0, OPEN);
	dir = f.how == FAILS ? NULL : next(fd);
	(void)leave(&f, dir != NULL ? 0 : -1, fd, 0, path_of(fd), NULL);
	return dir;
}

int closedir(DIR *dir)
{
	NEXT(int, "closedir", DIR *);
	int fd = dirfd(dir);

	if (on && !inside && path_of(fd) != NULL) {
		take_lock();
		fd_is(fd, NULL, false);
		drop_lock();
	}
	return next(dir);
}

static bool may_list(DIR *dir)
{
	struct fate f;

	if (!on || inside || path_of(dirfd(dir)) == NULL)
		return true;
	f = arrive("readdir", path_of(dirfd(dir)), 0, READ);
	return leave(&f, f.how == FAILS ? -1 : 0, 0, 0, path_of(dirfd(dir)), NULL) == 0;
}

struct dirent *readdir(DIR *dir)
{
	NEXT(struct dirent *, "readdir", DIR *);
	return may_list(dir) ? next(dir) : NULL;
}

struct dirent64 *readdir64(DIR *dir)
{
	NEXT(struct dirent64 *, "readdir64", DIR *);
	return may_list(dir) ? next(dir) : NULL;
}

/* ---- locks ---- */

static int controlled(int fd, int what, void *with)
{
	NEXT(int, "fcntl64", int, int, ...);
	bool waits_for = what == F_SETLKW || what == F_OFD_SETLKW;
	bool locks = waits_for || what == F_SETLK || what == F_OFD_SETLK;
	bool lets_go = locks && ((struct flock *)with)->l_type == F_UNLCK;
	struct fate f;
	int done, error;

	if (on && !inside && (what == F_DUPFD || what == F_DUPFD_CLOEXEC)) {
		done = next(fd, what, with);
		same_file(fd, done);
		return done;
	}
	if (!on || inside || !locks || path_of(fd) == NULL)
		return next(fd, what, with);
	f = arrive(lets_go ? "unlock" : "lock", path_of(fd), 0, LOCK);
	if (f.how == FAILS)
		return (int)leave(&f, -1, fd, what, path_of(fd), NULL);
	if (waits_for)
		drop_lock();            /* nobody is kept waiting by who waits */
	done = next(fd, what, with);
	error = errno;
	if (waits_for)
		take_lock();
	errno = error;
	return (int)leave(&f, done, fd, what, path_of(fd), NULL);
}

#define CONTROL_WITH(what, with) do { \
		va_list arguments; \
		va_start(arguments, what); \
		with = va_arg(arguments, void *); \
		va_end(arguments); \
	} while (0)

int fcntl(int fd, int what, ...)
{
	void *with;

	CONTROL_WITH(what, with);
	return controlled(fd, what, with);
}

int fcntl64(int fd, int what, ...)
{
	void *with;

	CONTROL_WITH(what, with);
	return controlled(fd, what, with);
}

int flock(int fd, int how)
{
	struct fate f;
	long done;

	if (!on || inside || path_of(fd) == NULL)
		return (int)syscall(SYS_flock, fd, how);
	f = arrive(how & LOCK_UN ? "unlock" : "lock", path_of(fd), 0, LOCK);
	done = f.how == FAILS ? -1 : syscall(SYS_flock, fd, how);
	return (int)leave(&f, done, fd, how, path_of(fd), NULL);
}

/* ---- processes ---- */

static int spawned(int (*next)(pid_t *, const char *, const posix_spawn_file_actions_t *,
    const posix_spawnattr_t *, char *const *, char *const *), pid_t *pid, const char *path,
    const posix_spawn_file_actions_t *files, const posix_spawnattr_t *how, char *const *arguments,
    char *const *environment)
{
	struct fate f;
	int done;

	if (!on || inside)
		return next(pid, path, files, how, arguments, environment);
	f = arrive("spawn", NULL, 0, PROC | OPEN);
	done = f.how == FAILS ? f.error : next(pid, path, files, how, arguments, environment);
	(void)leave(&f, done, 0, 0, NULL, NULL);
	return done;
}

int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *files,
    const posix_spawnattr_t *how, char *const *arguments, char *const *environment)
{
	NEXT(int, "posix_spawn", pid_t *, const char *, const posix_spawn_file_actions_t *,
	    const posix_spawnattr_t *, char *const *, char *const *);
	return spawned(next, pid, path, files, how, arguments, environment);
}

int posix_spawnp(pid_t *pid, const char *path, const posix_spawn_file_actions_t *files,
    const posix_spawnattr_t *how, char *const *arguments, char *const *environment)
{
	NEXT(int, "posix_spawnp", pid_t *, const char *, const posix_spawn_file_actions_t *,
	    const posix_spawnattr_t *, char *const *, char *const *);
	return spawned(next, pid, path, files, how, arguments, environment);
}

/* How a spawn is prepared takes memory too. */
#define PREPARED(name, declared, passed, ...) \
int name declared \
{ \
	NEXT(int, #name, __VA_ARGS__); \
	struct fate f; \
	int done; \
	if (!on || inside) \
		return next passed; \
	f = arrive(&#name[sizeof "posix_" - 1], NULL, 0, PROC); \
	done = f.how == FAILS ? f.error : next passed; \
	(void)leave(&f, done, 0, 0, NULL, NULL); \
	return done; \
}

PREPARED(posix_spawn_file_actions_init, (posix_spawn_file_actions_t *a), (a),
    posix_spawn_file_actions_t *)
PREPARED(posix_spawn_file_actions_adddup2, (posix_spawn_file_actions_t *a, int from, int to),
    (a, from, to), posix_spawn_file_actions_t *, int, int)
PREPARED(posix_spawn_file_actions_addclose, (posix_spawn_file_actions_t *a, int fd), (a, fd),
    posix_spawn_file_actions_t *, int)
PREPARED(posix_spawnattr_init, (posix_spawnattr_t *a), (a), posix_spawnattr_t *)
PREPARED(posix_spawnattr_setflags, (posix_spawnattr_t *a, short flags), (a, flags),
    posix_spawnattr_t *, short)
PREPARED(posix_spawnattr_setpgroup, (posix_spawnattr_t *a, pid_t group), (a, group),
    posix_spawnattr_t *, pid_t)

pid_t fork(void)
{
	NEXT(pid_t, "fork", void);
	struct fate f;
	pid_t pid;

	if (!on || inside)
		return next();
	f = arrive("fork", NULL, 0, PROC);
	pid = f.how == FAILS ? -1 : next();
	if (pid == 0) {
		on = turning = false;
		(void)pthread_mutex_unlock(&lock);
		inside--;
		return 0;
	}
	return (pid_t)leave(&f, pid, 0, 0, NULL, NULL);
}

pid_t waitpid(pid_t pid, int *how, int flags)
{
	NEXT(pid_t, "waitpid", pid_t, int *, int);
	bool had = my_turn;
	struct fate f;
	pid_t done;

	if (!on || inside)
		return next(pid, how, flags);
	f = arrive("waitpid", NULL, 0, PROC);
	if (f.how == FAILS)
		return (pid_t)leave(&f, -1, 0, 0, NULL, NULL);
	if ((flags & WNOHANG) == 0) {
		struct fate made = f;
		int error;
		drop_lock();
		give_turn();
		done = next(pid, how, flags);
		error = errno;
		if (had)
			await_turn(false, true);
		take_lock();
		errno = error;
		return (pid_t)leave(&made, done, 0, 0, NULL, NULL);
	}
	done = next(pid, how, flags);
	return (pid_t)leave(&f, done, 0, 0, NULL, NULL);
}

int pipe(int ends[2])
{
	NEXT(int, "pipe", int *);
	struct fate f;

	if (!on || inside)
		return next(ends);
	f = arrive("pipe", NULL, 0, OPEN);
	return (int)leave(&f, f.how == FAILS ? -1 : next(ends), 0, 0, NULL, NULL);
}

int pipe2(int ends[2], int flags)
{
	NEXT(int, "pipe2", int *, int);
	struct fate f;

	if (!on || inside)
		return next(ends, flags);
	f = arrive("pipe", NULL, 0, OPEN);
	return (int)leave(&f, f.how == FAILS ? -1 : next(ends, flags), 0, 0, NULL, NULL);
}

/* ---- memory ---- */

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *at, size_t size);

static bool memory_fails(void)
{
	unsigned long n;
	bool fails = false;

	if (!armed || inside)
		return false;
	n = __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < rule_count; i++) {
		struct rule *r = &rules[i];
		if (strcmp(r->kind, "mem") != 0 || n < r->k ||
		    (r->span >= 0 && n >= r->k + (unsigned long)r->span))
			continue;
		fails = true;
		if (n == r->k) {
			struct fate f = { .kind = "mem", .k = n };
			snprintf(f.class, sizeof f.class, "memory");
			inside++;
			put_hit(&f, "fail");
			inside--;
		}
	}
	if (fails)
		errno = ENOMEM;
	return fails;
}

void *malloc(size_t size)
{
	return memory_fails() ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
	return memory_fails() ? NULL : __libc_calloc(count, size);
}

void *realloc(void *at, size_t size)
{
	return memory_fails() ? NULL : __libc_realloc(at, size);
}

/* ---- the start and the end ---- */

static bool set(const char *name)
{
	const char *value = getenv(name);

	return value != NULL && *value != '\0';
}

__attribute__((constructor)) static void start(void)
{
	char *plan;

	if (!set("FAULTY_ROOT"))
		return;
	inside++;
	snprintf(root, sizeof root, "%s", getenv("FAULTY_ROOT"));
	root_len = strlen(root);
	if (set("FAULTY_PLAN")) {
		plan = strdup(getenv("FAULTY_PLAN"));
		for (char *rule = strtok(plan, ";"); rule != NULL; rule = strtok(NULL, ";"))
			read_rule(rule);
		free(plan);
	}
	if (set("FAULTY_SWALLOW"))
		swallow = strdup(getenv("FAULTY_SWALLOW"));
	if (set("FAULTY_LOG")) {
		const char *level = getenv("FAULTY_LEVEL");
		int fd = (int)syscall(SYS_openat, AT_FDCWD, getenv("FAULTY_LOG"),
		    O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
		log_fd = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 512L);
		if (log_fd < 0) {
			perror("faulty: the log");
			exit(74);
		}
		(void)syscall(SYS_close, fd);
		logging = true;
		with_calls = level != NULL && level[0] >= '1';
		with_data = level != NULL && level[0] >= '2';
	}
	syncing = set("FAULTY_SYNC");
	if (!set("FAULTY_INHERIT"))
		(void)unsetenv("LD_PRELOAD");
	turning = set("FAULTY_TURNS");
	for (const char *const *name = (const char *const []){ "FAULTY_ROOT", "FAULTY_PLAN",
	    "FAULTY_SWALLOW", "FAULTY_LOG", "FAULTY_LEVEL", "FAULTY_SYNC", "FAULTY_TURNS",
	    "FAULTY_INHERIT", NULL }; *name != NULL && !set("FAULTY_INHERIT"); name++)
		(void)unsetenv(*name);
	on = true;
	if (turning)
		my_turn = turn_taken = true;
	inside--;
}

/* So that a dry run tells how many allocations there are. */
__attribute__((destructor)) static void finish(void)
{
	if (on && logging) {
		take_lock();
		note("allocations", (long)allocations, NULL, NULL, 0);
		drop_lock();
	}
}
