/* io_uring with 128-byte entries through bare system calls, and ublk's control commands over it. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/io_uring.h>
#include <linux/ublk_cmd.h>

#define SQE_SIZE 128

struct ring {
	int fd;
	unsigned *sq_tail, sq_mask, *sq_array;
	unsigned *cq_head, *cq_tail, cq_mask;
	struct io_uring_cqe *cqes;
	unsigned char *sqes;
	unsigned unsubmitted;
};

static void fail(const char *what, int number)
{
	fprintf(stderr, "%s: %s\n", what, strerror(number));
	exit(1);
}

static void *map_ring(int fd, size_t size, uint64_t offset)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
	if (at == MAP_FAILED)
		fail("mmap of the ring", errno);
	return at;
}

static void ring_open(struct ring *ring, unsigned entries)
{
	struct io_uring_params p = { .flags = IORING_SETUP_SQE128 };
	ring->fd = syscall(SYS_io_uring_setup, entries, &p);
	if (ring->fd < 0)
		fail("io_uring_setup", errno);
	size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	char *rings = map_ring(ring->fd, sq_size > cq_size ? sq_size : cq_size, IORING_OFF_SQ_RING);
	ring->sq_tail = (unsigned *)(rings + p.sq_off.tail);
	ring->sq_mask = *(unsigned *)(rings + p.sq_off.ring_mask);
	ring->sq_array = (unsigned *)(rings + p.sq_off.array);
	ring->cq_head = (unsigned *)(rings + p.cq_off.head);
	ring->cq_tail = (unsigned *)(rings + p.cq_off.tail);
	ring->cq_mask = *(unsigned *)(rings + p.cq_off.ring_mask);
	ring->cqes = (struct io_uring_cqe *)(rings + p.cq_off.cqes);
	ring->sqes = map_ring(ring->fd, p.sq_entries * SQE_SIZE, IORING_OFF_SQES);
	ring->unsubmitted = 0;
}

/* The command area of a new IORING_OP_URING_CMD entry. The caller sees to it that the ring is large enough. */
static void *ring_command(struct ring *ring, int fd, unsigned cmd_op, uint64_t user_data)
{
	unsigned tail = *ring->sq_tail, place = tail & ring->sq_mask;
	struct io_uring_sqe *sqe = memset(ring->sqes + place * SQE_SIZE, 0, SQE_SIZE);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = cmd_op;
	sqe->user_data = user_data;
	ring->sq_array[place] = place;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	ring->unsubmitted++;
	return sqe->cmd;
}

/* Hand over what was written, and sleep until `wait_for` completions are there. A signal only makes it look again. */
static void ring_enter(struct ring *ring, unsigned wait_for)
{
	int sent = syscall(SYS_io_uring_enter, ring->fd, ring->unsubmitted, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
	if (sent < 0 && errno != EINTR)
		fail("io_uring_enter", errno);
	if (sent > 0)
		ring->unsubmitted -= sent;
}

static int ring_next(struct ring *ring, struct io_uring_cqe *into)
{
	unsigned head = *ring->cq_head;
	if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
		return 0;
	*into = ring->cqes[head & ring->cq_mask];
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return 1;
}

static struct ublksrv_ctrl_cmd *control_command(struct ring *ring, int control, unsigned op, unsigned id, uint64_t tag)
{
	struct ublksrv_ctrl_cmd *command = ring_command(ring, control, op, tag);
	command->dev_id = id;
	command->queue_id = -1;
	return command;
}

/* One control command, alone on the ring; its result. */
static inline int control(struct ring *ring, int fd, unsigned op, unsigned id, void *buffer, size_t size)
{
	struct ublksrv_ctrl_cmd *command = control_command(ring, fd, op, id, 0);
	struct io_uring_cqe cqe;
	command->addr = (uintptr_t)buffer;
	command->len = size;
	do
		ring_enter(ring, 1);
	while (!ring_next(ring, &cqe));
	return cqe.res;
}

static int open_control(void)
{
	int fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail("/dev/ublk-control", errno);
	return fd;
}

/* The exclusive open. udev's probe and, since 6.15, the last closer's own work may have it for a moment. */
static inline int open_char_device(unsigned id)
{
	char path[32];
	snprintf(path, sizeof path, "/dev/ublkc%u", id);
	for (int attempt = 0; attempt < 100; attempt++) {
		int fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd >= 0)
			return fd;
		if (errno != EBUSY && errno != ENOENT)
			break;
		usleep(10000);
	}
	fail(path, errno);
	return -1;
}
