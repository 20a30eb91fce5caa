/*
 * mini_server [--id N] [--recovery] [--fail-io] [--flags BITS] [--depth N] [--size MIB]
 * mini_server --recover ID
 * ... [--stop-after STEP] [--die-at STEP] [--backing FILE] [--lock] [--daemon] [--die-after SECONDS] [--end]
 *
 * A ublk server that shares no line with the project's own: one queue, one thread. Reads give zeros and writes vanish,
 * unless --backing names a file of the disk's size (mapped; on ramfs it cannot be swapped out).
 * --lock: mlockall, and PR_SET_IO_FLUSHER, as whoever serves a swap has to. --daemon: serve in a forked child in a session
 * of its own, and exit with 0 once it serves. --die-after: die so long after it began to serve (SIGALRM).
 * It says ADDED ID, LIVE ID (or RECOVERED ID), and then serves until a signal kills it; it cleans up only with --end, which
 * stops and deletes the device as soon as it is LIVE.
 * A STEP is, in this order: control (open), add (or START_USER_RECOVERY), params, open, mmap, fetch, start-sent, start, io (the
 * first request after that), stop-sent, stop, delete. --stop-after: go no further, and sleep (it says STEP ID, in capitals).
 * --die-at: kill itself there.
 * SIGUSR1: answer no request from now on (it says HOLDING ID at the first one).
 */
#include <ctype.h>
#include <getopt.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "uring.h"

#define IO_SIZE (128 << 10)
#define MAX_DEPTH 256
#define START_TAG UINT64_MAX
#define STOP_TAG (UINT64_MAX - 1)

static volatile sig_atomic_t holding;

static void hold(int signal_number)
{
	(void)signal_number;
	holding = 1;
}

static void say(const char *word, unsigned id)
{
	printf("%s %u\n", word, id);
	fflush(stdout);
}

static const char *last_step, *deadly_step;

static int matters(const char *step)
{
	return (last_step && !strcmp(step, last_step)) || (deadly_step && !strcmp(step, deadly_step));
}

/* Sleep for ever, or die, at the step that was asked for. */
static void reach(const char *step, unsigned id)
{
	char word[16] = "";
	if (!matters(step))
		return;
	if (deadly_step && !strcmp(step, deadly_step))
		kill(getpid(), SIGKILL);
	for (size_t i = 0; step[i]; i++)
		word[i] = toupper(step[i]);
	say(word, id);
	for (;;)
		pause();
}

struct server {
	struct ring ring;
	int control, node;
	unsigned id, depth;
	char *buffers;
	char *disk;   /* the mapped backing, or NULL */
	int told;     /* where a forked server says that it serves, or -1 */
	unsigned die_after;
	int end; /* 1: as soon as it is LIVE, 2: STOP_DEV is under way */
	const struct ublksrv_io_desc *requests;
};

static void fetch(struct server *server, unsigned op, unsigned tag, int result)
{
	struct ublksrv_io_cmd *command = ring_command(&server->ring, server->node, op, tag);
	command->tag = tag;
	command->result = result;
	command->addr = (uintptr_t)(server->buffers + (size_t)tag * IO_SIZE);
}

static int answer(const struct server *server, const struct ublksrv_io_desc *request, char *buffer)
{
	int size = request->nr_sectors << 9;
	char *there = server->disk ? server->disk + (request->start_sector << 9) : NULL;
	switch (ublksrv_get_op(request)) {
	case UBLK_IO_OP_READ:
		if (there)
			memcpy(buffer, there, size);
		else
			memset(buffer, 0, size);
		return size;
	case UBLK_IO_OP_WRITE:
		if (there)
			memcpy(there, buffer, size);
		return size;
	default: /* flush; nothing else was promised in the parameters */
		return 0;
	}
}

static void add(struct server *server, uint64_t flags, unsigned mebibytes)
{
	struct ublksrv_ctrl_dev_info info = {
		.nr_hw_queues = 1, .queue_depth = server->depth, .max_io_buf_bytes = IO_SIZE,
		.dev_id = server->id, .ublksrv_pid = -1, .flags = flags,
	};
	int result = control(&server->ring, server->control, UBLK_U_CMD_ADD_DEV, server->id, &info, sizeof info);
	if (result < 0)
		fail("ADD_DEV", -result);
	server->id = info.dev_id;
	say("ADDED", server->id);
	reach("add", server->id);
	struct ublk_params params = {
		.len = sizeof params, .types = UBLK_PARAM_TYPE_BASIC,
		.basic = {
			.attrs = UBLK_ATTR_VOLATILE_CACHE, .logical_bs_shift = 9, .physical_bs_shift = 12,
			.io_opt_shift = 12, .io_min_shift = 9, .max_sectors = IO_SIZE >> 9,
			.dev_sectors = (uint64_t)mebibytes << 11,
		},
	};
	result = control(&server->ring, server->control, UBLK_U_CMD_SET_PARAMS, server->id, &params, sizeof params);
	if (result < 0)
		fail("SET_PARAMS", -result);
	reach("params", server->id);
}

/* Map the backing, made as large as the disk when it is new. */
static void map_backing(struct server *server, const char *path, unsigned mebibytes)
{
	struct stat status;
	int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (file < 0 || fstat(file, &status) < 0)
		fail(path, errno);
	if (!status.st_size) {
		status.st_size = (off_t)mebibytes << 20;
		if (ftruncate(file, status.st_size) < 0)
			fail("ftruncate", errno);
	}
	server->disk = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
	if (server->disk == MAP_FAILED)
		fail("mmap of the backing", errno);
	close(file);
}

static void lock_memory(void)
{
	if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
		fail("mlockall", errno);
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0); /* refused without CAP_SYS_RESOURCE: then without */
}

/* Go on in a child; the parent waits for its word and leaves. */
static void become_daemon(struct server *server)
{
	int ends[2];
	char word;
	if (pipe(ends) < 0)
		fail("pipe", errno);
	pid_t child = fork();
	if (child < 0)
		fail("fork", errno);
	if (child) {
		close(ends[1]);
		_exit(read(ends[0], &word, 1) == 1 ? 0 : 1);
	}
	setsid();
	close(ends[0]);
	server->told = ends[1];
}

static void open_queue(struct server *server)
{
	server->node = open_char_device(server->id);
	reach("open", server->id);
	server->buffers = aligned_alloc(4096, (size_t)server->depth * IO_SIZE);
	server->requests = mmap(NULL, server->depth * sizeof(struct ublksrv_io_desc), PROT_READ,
				MAP_SHARED | MAP_POPULATE, server->node, UBLKSRV_CMD_BUF_OFFSET);
	if (!server->buffers || server->requests == MAP_FAILED)
		fail("mmap of the queue", errno);
	reach("mmap", server->id);
}

static void stop(struct server *server)
{
	server->end = 2;
	control_command(&server->ring, server->control, UBLK_U_CMD_STOP_DEV, server->id, STOP_TAG);
	if (matters("stop-sent"))
		ring_enter(&server->ring, 0);
	reach("stop-sent", server->id);
}

static void on_started(struct server *server, const char *started, int result)
{
	if (result < 0)
		fail("START_DEV", -result);
	say(started, server->id);
	reach("start", server->id);
	if (server->told >= 0 && write(server->told, "+", 1) == 1)
		close(server->told);
	if (server->die_after)
		alarm(server->die_after);
	if (server->end)
		stop(server);
}

static void serve(struct server *server, const char *started)
{
	unsigned open_tags = server->depth;
	int is_live = 0;
	struct io_uring_cqe cqe;
	while (open_tags || server->end == 2) {
		ring_enter(&server->ring, 1);
		while (ring_next(&server->ring, &cqe)) {
			unsigned tag = cqe.user_data;
			if (cqe.user_data == START_TAG) {
				on_started(server, started, cqe.res);
				is_live = 1;
			} else if (cqe.user_data == STOP_TAG) {
				server->end = 3;
				reach("stop", server->id);
			} else if (cqe.res != UBLK_IO_RES_OK) {
				open_tags--; /* the device goes */
			} else if (holding) {
				say("HOLDING", server->id);
			} else {
				if (is_live)
					reach("io", server->id);
				int result = answer(server, &server->requests[tag], server->buffers + (size_t)tag * IO_SIZE);
				fetch(server, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result);
			}
		}
	}
}

/* DEL_DEV waits for whoever has the node: for ourselves, too. */
static void delete(struct server *server)
{
	munmap((void *)server->requests, server->depth * sizeof(struct ublksrv_io_desc));
	close(server->node);
	int result = control(&server->ring, server->control, UBLK_U_CMD_DEL_DEV, server->id, NULL, 0);
	if (result < 0)
		fail("DEL_DEV", -result);
	reach("delete", server->id);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "id", 1, 0, 'i' }, { "recovery", 0, 0, 'r' }, { "fail-io", 0, 0, 'f' }, { "flags", 1, 0, 'F' },
		{ "depth", 1, 0, 'd' }, { "size", 1, 0, 's' }, { "stop-after", 1, 0, 'S' }, { "recover", 1, 0, 'R' },
		{ "backing", 1, 0, 'b' }, { "lock", 0, 0, 'l' }, { "daemon", 0, 0, 'D' }, { "die-after", 1, 0, 'a' },
		{ "die-at", 1, 0, 'A' }, { "end", 0, 0, 'e' }, { 0 },
	};
	struct server server = { .id = -1, .depth = 16, .told = -1 };
	uint64_t flags = 0;
	unsigned mebibytes = 64;
	const char *backing = NULL;
	int recover = 0, lock = 0, daemon = 0, option;
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'i': server.id = strtoul(optarg, NULL, 10); break;
		case 'r': flags |= UBLK_F_USER_RECOVERY; break;
		case 'f': flags |= UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO; break;
		case 'F': flags |= strtoull(optarg, NULL, 0); break;
		case 'd': server.depth = strtoul(optarg, NULL, 10); break;
		case 's': mebibytes = strtoul(optarg, NULL, 10); break;
		case 'S': last_step = optarg; break;
		case 'A': deadly_step = optarg; break;
		case 'e': server.end = 1; break;
		case 'R': recover = 1, server.id = strtoul(optarg, NULL, 10); break;
		case 'b': backing = optarg; break;
		case 'l': lock = 1; break;
		case 'D': daemon = 1; break;
		case 'a': server.die_after = strtoul(optarg, NULL, 10); break;
		default: return 2;
		}
	}
	signal(SIGUSR1, hold); /* SIGALRM ends it like any other death */
	if (daemon)
		become_daemon(&server);
	if (backing)
		map_backing(&server, backing, mebibytes);
	if (lock)
		lock_memory();
	ring_open(&server.ring, 2 * MAX_DEPTH);
	server.control = open_control();
	reach("control", server.id);
	if (recover) {
		struct ublksrv_ctrl_dev_info info;
		int result = control(&server.ring, server.control, UBLK_U_CMD_START_USER_RECOVERY, server.id, NULL, 0);
		if (result < 0 && result != -EINVAL) /* up to 6.14: somebody has begun a recovery, and died */
			fail("START_USER_RECOVERY", -result);
		result = control(&server.ring, server.control, UBLK_U_CMD_GET_DEV_INFO, server.id, &info, sizeof info);
		if (result < 0)
			fail("GET_DEV_INFO", -result);
		server.depth = info.queue_depth;
		reach("add", server.id);
	} else {
		add(&server, flags, mebibytes);
	}
	if (server.depth > MAX_DEPTH)
		fail("queue depth", ERANGE);
	open_queue(&server);
	for (unsigned tag = 0; tag < server.depth; tag++)
		fetch(&server, UBLK_U_IO_FETCH_REQ, tag, 0);
	if (matters("fetch"))
		ring_enter(&server.ring, 0);
	reach("fetch", server.id);
	unsigned op = recover ? UBLK_U_CMD_END_USER_RECOVERY : UBLK_U_CMD_START_DEV;
	control_command(&server.ring, server.control, op, server.id, START_TAG)->data[0] = getpid();
	if (matters("start-sent"))
		ring_enter(&server.ring, 0);
	reach("start-sent", server.id);
	serve(&server, recover ? "RECOVERED" : "LIVE");
	if (server.end == 3)
		delete(&server);
	return 0;
}
