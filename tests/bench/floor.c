/* floor - what the benchmark compares with: the least that a machine must do.
 *
 *	floor time [-k] CMD...		run CMD and print "usage WALL USER SYSTEM KIB
 *					STATUS"; -k: end it when standard input ends
 *	floor receive -d MS FILE HOST	take one connection at a free port of HOST, its
 *					address in FILE; at its end, MS later, reply
 *	floor send HOST PORT OCTETS	send so many, then wait for that reply
 *	floor receive -t CERT FILE HOST	the same over TLS, CERT with its key; no delay at
 *	floor send -t HOST PORT OCTETS	the end, and whose certificate it is is not looked
 *					at.  With -DWITH_TLS: to load the library takes time
 *	floor connect HOST PORT CMD...	run CMD with a socket as its standard output
 *	floor rtt HOST PORT		print the milliseconds that connecting takes
 *	floor idle HOST PORT N		hold N sessions that have sent a message each
 *	floor repeat N FILE		print FILE N times
 *	floor files DIR N GROUP SIZE	N files in DIR/tmp, each GROUP synced at once and
 *					then renamed to DIR/new, as a Maildir is filled
 *	floor appends FILE N GROUP SIZE	N pieces appended, each GROUP synced at once
 *
 * The sockets have the options that bsmtp sets; the reply's delay is what
 * "bsmtp listen --latency" does to a session.
 */
#define _GNU_SOURCE
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif
#ifdef __linux__
#include <sys/prctl.h>
#endif

static char buffer[256 << 10];
static pid_t child;

static void die(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void pause_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&t, &t) != 0)
		;
}

static void write_all(int fd, const char *data, size_t len, const char *what)
{
	while (len > 0) {
		ssize_t n = write(fd, data, len);
		if (n < 0)
			die(what);
		data += n;
		len -= (size_t)n;
	}
}

/* ---- time ---- */

static void on_child(int number) { (void)number; }

static void on_alarm(int number)
{
	(void)number;
	kill(child, SIGKILL);
}

/* Waits until standard input or the child ends, and ends the other. */
static void keep(const sigset_t *old)
{
	siginfo_t ended;
	fd_set in;

	for (;;) {
		ended.si_pid = 0;
		if (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid != 0)
			return;
		FD_ZERO(&in);
		FD_SET(0, &in);
		if (pselect(1, &in, NULL, NULL, NULL, old) > 0 && read(0, buffer, sizeof buffer) <= 0)
			break;
	}
	kill(child, SIGTERM);
	alarm(10);
}

static double seconds(struct timeval t) { return (double)t.tv_sec + (double)t.tv_usec / 1e6; }

static int run_timed(bool lifeline, char **cmd)
{
	double start = now();
	struct rusage usage;
	sigset_t block, old;
	int status;

	signal(SIGCHLD, on_child);
	signal(SIGALRM, on_alarm);
	sigemptyset(&block);
	sigaddset(&block, SIGCHLD);
	sigprocmask(SIG_BLOCK, &block, &old);
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		sigprocmask(SIG_SETMASK, &old, NULL);
#ifdef __linux__
		prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
		if (lifeline && (close(0) != 0 || open("/dev/null", O_RDONLY) != 0))
			die("/dev/null");
		execvp(cmd[0], cmd);
		die(cmd[0]);
	}
	if (lifeline)
		keep(&old);
	while (wait4(child, &status, 0, &usage) < 0)
		if (errno != EINTR)
			die("wait4");
	printf("usage %.6f %.6f %.6f %ld %d\n", now() - start, seconds(usage.ru_utime),
	    seconds(usage.ru_stime), usage.ru_maxrss,
	    WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	return 0;
}

/* ---- sockets ---- */

static void set_options(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static struct addrinfo *look_up(const char *host, const char *port)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found;
	int error = getaddrinfo(host, port, &hints, &found);

	if (error != 0) {
		fprintf(stderr, "floor: %s: %s\n", host, gai_strerror(error));
		exit(1);
	}
	return found;
}

static int connect_to(const char *host, const char *port)
{
	struct addrinfo *a = look_up(host, port);
	int fd = socket(a->ai_family, SOCK_STREAM, 0);

	if (fd < 0)
		die("socket");
	set_options(fd);
	if (connect(fd, a->ai_addr, a->ai_addrlen) != 0)
		die("connect");
	freeaddrinfo(a);
	return fd;
}

static int listen_at(const char *file, const char *host)
{
	struct addrinfo *a = look_up(host, "0");
	int fd = socket(a->ai_family, SOCK_STREAM, 0);
	char name[64], port[16], whole[4096];
	FILE *f;

	if (fd < 0 || bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, 1) != 0 ||
	    getsockname(fd, a->ai_addr, &a->ai_addrlen) != 0 || getnameinfo(a->ai_addr, a->ai_addrlen,
	    name, sizeof name, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
		die("listen");
	snprintf(whole, sizeof whole, "%s.new", file);
	f = fopen(whole, "w");
	if (f == NULL)
		die(whole);
	fprintf(f, strchr(name, ':') != NULL ? "[%s]:%s\n" : "%s:%s\n", name, port);
	if (fclose(f) != 0 || rename(whole, file) != 0)
		die(file);
	freeaddrinfo(a);
	return fd;
}

static int receive(long delay, const char *file, const char *host)
{
	int fd = accept(listen_at(file, host), NULL, NULL);
	unsigned long long total = 0;
	ssize_t n;

	if (fd < 0)
		die("accept");
	set_options(fd);
	while ((n = read(fd, buffer, sizeof buffer)) > 0)
		total += (unsigned long long)n;
	if (n < 0)
		die("read");
	pause_ms(delay);
	n = snprintf(buffer, sizeof buffer, "%llu\n", total);
	printf("%s", buffer);
	if (send(fd, buffer, (size_t)n, MSG_NOSIGNAL) != n && errno != EPIPE && errno != ECONNRESET)
		die("send");            /* cat has not waited for it */
	return 0;
}

static int send_octets(const char *host, const char *port, unsigned long long octets)
{
	int fd = connect_to(host, port);
	unsigned long long left = octets, said = octets + 1;
	size_t have = 0, n;
	ssize_t got;

	for (; left > 0; left -= n) {
		n = left < sizeof buffer ? (size_t)left : sizeof buffer;
		write_all(fd, buffer, n, "send");
	}
	shutdown(fd, SHUT_WR);
	while ((got = read(fd, buffer + have, 64 - have)) > 0)
		have += (size_t)got;
	buffer[have] = '\0';
	if (sscanf(buffer, "%llu", &said) != 1 || said != octets) {
		fprintf(stderr, "floor: sent %llu, and the other end says \"%s\"\n", octets, buffer);
		return 1;
	}
	return 0;
}

/* ---- the same over TLS ---- */

#ifdef WITH_TLS
static void die_of_tls(const char *what)
{
	fprintf(stderr, "floor: %s\n", what);
	ERR_print_errors_fp(stderr);
	exit(1);
}

/* With a certificate the server, without the client. */
static SSL *secure(int fd, const char *cert)
{
	SSL_CTX *ctx = SSL_CTX_new(cert != NULL ? TLS_server_method() : TLS_client_method());
	SSL *ssl;

	if (ctx == NULL || (cert != NULL && (SSL_CTX_use_certificate_chain_file(ctx, cert) != 1 ||
	    SSL_CTX_use_PrivateKey_file(ctx, cert, SSL_FILETYPE_PEM) != 1)))
		die_of_tls("certificate");
#ifdef SSL_OP_ENABLE_KTLS
	SSL_CTX_set_options(ctx, SSL_OP_ENABLE_KTLS);
#endif
	ssl = SSL_new(ctx);
	if (ssl == NULL || SSL_set_fd(ssl, fd) != 1 ||
	    (cert != NULL ? SSL_accept(ssl) : SSL_connect(ssl)) != 1)
		die_of_tls("handshake");
	return ssl;
}

static int receive_secured(const char *cert, const char *file, const char *host)
{
	int fd = accept(listen_at(file, host), NULL, NULL), n;
	unsigned long long total = 0;
	SSL *ssl;

	if (fd < 0)
		die("accept");
	set_options(fd);
	ssl = secure(fd, cert);
	while ((n = SSL_read(ssl, buffer, sizeof buffer)) > 0)
		total += (unsigned long long)n;
	if (SSL_get_error(ssl, n) != SSL_ERROR_ZERO_RETURN)
		die_of_tls("read");
	n = snprintf(buffer, sizeof buffer, "%llu\n", total);
	printf("%s", buffer);
	if (SSL_write(ssl, buffer, n) != n || SSL_shutdown(ssl) < 0)
		die_of_tls("write");
	return 0;
}

static int send_secured(const char *host, const char *port, unsigned long long octets)
{
	SSL *ssl = secure(connect_to(host, port), NULL);
	unsigned long long left = octets, said = octets + 1;
	int n;

	for (; left > 0; left -= (unsigned long long)n) {
		n = SSL_write(ssl, buffer, left < sizeof buffer ? (int)left : (int)sizeof buffer);
		if (n <= 0)
			die_of_tls("write");
	}
	SSL_shutdown(ssl);
	n = SSL_read(ssl, buffer, 64);
	buffer[n > 0 ? n : 0] = '\0';
	if (sscanf(buffer, "%llu", &said) != 1 || said != octets) {
		fprintf(stderr, "floor: sent %llu, and the other end says \"%s\"\n", octets, buffer);
		return 1;
	}
	return 0;
}
#endif

static int run_connected(const char *host, const char *port, char **cmd)
{
	if (dup2(connect_to(host, port), 1) < 0)
		die("dup2");
	execvp(cmd[0], cmd);
	die(cmd[0]);
	return 1;
}

static int print_rtt(const char *host, const char *port)
{
	double best = 1e9;

	for (int i = 0; i < 5; i++) {
		double start = now();
		close(connect_to(host, port));
		if (now() - start < best)
			best = now() - start;
	}
	printf("%.3f\n", best * 1e3);
	return 0;
}

/* Reads to the end of the n-th reply; one that refuses ends us. */
static void expect_replies(int fd, int n)
{
	char line[512];
	size_t len = 0;

	while (n > 0) {
		if (read(fd, line + len, 1) != 1)
			die("a session ended");
		if (line[len] != '\n') {
			len += len < sizeof line - 1;
			continue;
		}
		if (line[0] != '2') {
			fprintf(stderr, "floor: %.*s\n", (int)len, line);
			exit(1);
		}
		n -= len > 3 && line[3] == ' ';
		len = 0;
	}
}

static int hold_sessions(const char *host, const char *port, long n)
{
	enum { BODY = 4096, REPLIES = 5 };      /* with the greeting */
	int head = snprintf(buffer, sizeof buffer, "BSMTP client.example.org\r\n"
	    "MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nBDAT %d LAST\r\n", BODY);

	for (int i = 0; i < BODY; i++)
		buffer[head + i] = i % 64 < 62 ? 'x' : i % 64 == 62 ? '\r' : '\n';
	for (; n > 0; n--) {
		int fd = connect_to(host, port);
		write_all(fd, buffer, (size_t)head + BODY, "send");
		expect_replies(fd, REPLIES);
	}
	pause_ms(200);
	return 0;
}

/* ---- the disk ---- */

static int repeat(long n, const char *file)
{
	struct stat st;
	char *all;
	int fd = open(file, O_RDONLY);

	if (fd < 0 || fstat(fd, &st) != 0 || (all = malloc((size_t)st.st_size)) == NULL ||
	    read(fd, all, (size_t)st.st_size) != st.st_size)
		die(file);
	for (; n > 0; n--)
		write_all(1, all, (size_t)st.st_size, "standard output");
	return 0;
}

static void sync_group(int dir, const int *fds, long n)
{
#ifdef __linux__
	(void)fds;
	(void)n;
	if (syncfs(dir) != 0)
		die("syncfs");
#else
	(void)dir;
	for (long i = 0; i < n; i++)
		if (fsync(fds[i]) != 0)
			die("fsync");
#endif
}

static int open_folder(const char *path)
{
	int fd;

	if ((mkdir(path, 0777) != 0 && errno != EEXIST) || (fd = open(path, O_RDONLY | O_DIRECTORY)) < 0)
		die(path);
	return fd;
}

static int write_files(const char *path, long n, long group, size_t size)
{
	int dir = open_folder(path), tmp, new, *fds = calloc((size_t)group, sizeof *fds);
	char name[64];

	if (fds == NULL || fchdir(dir) != 0)
		die(path);
	tmp = open_folder("tmp");
	new = open_folder("new");
	for (long first = 0; first < n; first += group) {
		long count = n - first < group ? n - first : group;
		for (long i = 0; i < count; i++) {
			snprintf(name, sizeof name, "1700000000.M%06ldP12345Q%ld.host", (first + i) % 1000000, first + i);
			fds[i] = openat(tmp, name, O_WRONLY | O_CREAT | O_EXCL, 0666);
			if (fds[i] < 0)
				die(name);
			write_all(fds[i], buffer, size, name);
		}
		sync_group(dir, fds, count);
		for (long i = 0; i < count; i++) {
			snprintf(name, sizeof name, "1700000000.M%06ldP12345Q%ld.host", (first + i) % 1000000, first + i);
			if (close(fds[i]) != 0 || renameat(tmp, name, new, name) != 0)
				die(name);
		}
		if (fsync(new) != 0)
			die("fsync");
	}
	return 0;
}

static int append(const char *file, long n, long group, size_t size)
{
	int fd = open(file, O_WRONLY | O_CREAT | O_APPEND, 0666);

	if (fd < 0)
		die(file);
	for (long i = 1; i <= n; i++) {
		write_all(fd, buffer, size, file);
		if ((i % group == 0 || i == n) && fdatasync(fd) != 0)
			die(file);
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";

	memset(buffer, 'x', sizeof buffer);
	if (strcmp(verb, "time") == 0 && argc > 3 && strcmp(argv[2], "-k") == 0)
		return run_timed(true, argv + 3);
	if (strcmp(verb, "time") == 0 && argc > 2)
		return run_timed(false, argv + 2);
	if (strcmp(verb, "receive") == 0 && argc == 6 && strcmp(argv[2], "-d") == 0)
		return receive(atol(argv[3]), argv[4], argv[5]);
	if (strcmp(verb, "send") == 0 && argc == 5)
		return send_octets(argv[2], argv[3], strtoull(argv[4], NULL, 10));
#ifdef WITH_TLS
	if (strcmp(verb, "receive") == 0 && argc == 6 && strcmp(argv[2], "-t") == 0)
		return receive_secured(argv[3], argv[4], argv[5]);
	if (strcmp(verb, "send") == 0 && argc == 6 && strcmp(argv[2], "-t") == 0)
		return send_secured(argv[3], argv[4], strtoull(argv[5], NULL, 10));
#endif
	if (strcmp(verb, "connect") == 0 && argc > 4)
		return run_connected(argv[2], argv[3], argv + 4);
	if (strcmp(verb, "rtt") == 0 && argc == 4)
		return print_rtt(argv[2], argv[3]);
	if (strcmp(verb, "idle") == 0 && argc == 5)
		return hold_sessions(argv[2], argv[3], atol(argv[4]));
	if (strcmp(verb, "repeat") == 0 && argc == 4)
		return repeat(atol(argv[2]), argv[3]);
	if (strcmp(verb, "files") == 0 && argc == 6)
		return write_files(argv[2], atol(argv[3]), atol(argv[4]), strtoul(argv[5], NULL, 10));
	if (strcmp(verb, "appends") == 0 && argc == 6)
		return append(argv[2], atol(argv[3]), atol(argv[4]), strtoul(argv[5], NULL, 10));
	fputs("usage: see the head of floor.c\n", stderr);
	return 2;
}
