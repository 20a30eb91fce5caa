/*
 * batch_delete [--open] ID...
 *
 * How fast can devices go when nobody looks twice: DEL_DEV_ASYNC of all ids in one system call, then GET_DEV_INFO until
 * every id is free. The benchmark's peer for "64 servers die at once". --open holds every char device during its
 * deletion, as a careful cleaner does. Prints: deleted N in X.XXX ms
 */
#include <time.h>

#include "uring.h"

static double now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* The same command for every id not yet done, in one batch; results[i] of the others stays as it is. */
static void batch(struct ring *ring, int fd, unsigned op, unsigned *ids, int *results, const char *done, int count,
		  struct ublksrv_ctrl_dev_info *infos)
{
	struct io_uring_cqe cqe;
	int pending = 0;
	for (int i = 0; i < count; i++) {
		if (done[i])
			continue;
		struct ublksrv_ctrl_cmd *command = control_command(ring, fd, op, ids[i], i);
		command->addr = infos ? (uintptr_t)&infos[i] : 0;
		command->len = infos ? sizeof infos[i] : 0;
		pending++;
	}
	while (pending) {
		ring_enter(ring, pending);
		for (; ring_next(ring, &cqe); pending--)
			results[cqe.user_data] = cqe.res;
	}
}

int main(int argc, char **argv)
{
	int first = argc > 1 && !strcmp(argv[1], "--open") ? 2 : 1, count = argc - first;
	if (count < 1 || count > 4096) {
		fprintf(stderr, "usage: batch_delete [--open] ID...\n");
		return 2;
	}
	unsigned *ids = calloc(count, sizeof *ids);
	int *results = calloc(count, sizeof *results), *nodes = calloc(count, sizeof *nodes);
	char *done = calloc(count, 1);
	struct ublksrv_ctrl_dev_info *infos = calloc(count, sizeof *infos);
	for (int i = 0; i < count; i++)
		ids[i] = strtoul(argv[first + i], NULL, 10);

	struct ring ring;
	ring_open(&ring, count);
	int fd = open_control();
	double began = now_ms();
	for (int i = 0; first == 2 && i < count; i++)
		nodes[i] = open_char_device(ids[i]);
	batch(&ring, fd, UBLK_U_CMD_DEL_DEV_ASYNC, ids, results, done, count, NULL);
	for (int i = 0; i < count; i++) {
		if (results[i] < 0)
			fail("DEL_DEV_ASYNC", -results[i]);
		if (first == 2)
			close(nodes[i]);
	}
	for (int left = count; left;) {
		batch(&ring, fd, UBLK_U_CMD_GET_DEV_INFO, ids, results, done, count, infos);
		for (int i = 0; i < count; i++)
			if (!done[i] && results[i] == -ENODEV)
				done[i] = 1, left--;
		if (left)
			usleep(1000);
	}
	printf("deleted %d in %.3f ms\n", count, now_ms() - began);
	return 0;
}
