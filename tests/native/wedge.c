/*
 * wedge delete ID | wedge stop ID | wedge reread ID | wedge catch PID...
 *
 * Somebody else, who does to a ublk device what may never end. It says what it is at, and how that ended.
 * delete, stop: DEL_DEV, STOP_DEV, whatever the device is doing (SENT ID, ENDED RESULT).
 * reread: has the kernel read the disk's partitions anew (BLKRRPART), which takes the disk's open_mutex. Its descriptor of the
 * disk is closed while it waits for that, so that nobody can see who has it open (REREADING ID, ENDED ERRNO).
 * catch: stops the first of these processes that is about to enter an io_uring, before anything is sent (CAUGHT PID). It goes
 * on as soon as this program has ended.
 */
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include <linux/fs.h>
#include <linux/sched.h>

#include "uring.h"

#define MOST_CAUGHT 16
#define SYSCALL_STOP (SIGTRAP | 0x80)

static void say(const char *word, long number)
{
	printf("%s %ld\n", word, number);
	fflush(stdout);
}

static void send_command(unsigned op, unsigned id)
{
	struct ring ring;
	struct io_uring_cqe cqe;
	ring_open(&ring, 4);
	control_command(&ring, open_control(), op, id, 0);
	ring_enter(&ring, 0);
	say("SENT", id);
	while (!ring_next(&ring, &cqe))
		ring_enter(&ring, 1);
	say("ENDED", cqe.res);
}

static int sleeps_uninterruptibly(pid_t pid)
{
	char path[32], text[512] = "";
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
		fail(path, errno);
	close(fd);
	char *after_name = strrchr(text, ')');
	return after_name && !strncmp(after_name, ") D", 3);
}

static void reread(unsigned id)
{
	char path[32];
	int status;
	snprintf(path, sizeof path, "/dev/ublkb%u", id);
	int disk = open(path, O_RDONLY | O_CLOEXEC);
	if (disk < 0)
		fail(path, errno);
	/* A process of its own, with the same table of descriptors: closed here, it is closed there. */
	pid_t child = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (child < 0)
		fail("clone", errno);
	if (!child)
		_exit(ioctl(disk, BLKRRPART) < 0 ? errno : 0);
	while (!sleeps_uninterruptibly(child))
		usleep(10000);
	close(disk);
	say("REREADING", id);
	if (waitpid(child, &status, 0) < 0)
		fail("waitpid", errno);
	say("ENDED", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

static int is_about_to_enter(pid_t pid)
{
	struct __ptrace_syscall_info info;
	if (ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof info, &info) < 0)
		return 0;
	return info.op == PTRACE_SYSCALL_INFO_ENTRY && info.entry.nr == SYS_io_uring_enter;
}

/* Let go of a process that runs. Only one that is stopped can be let go. */
static void release(pid_t pid)
{
	int status;
	if (!ptrace(PTRACE_INTERRUPT, pid, 0, 0) && waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status))
		ptrace(PTRACE_DETACH, pid, 0, 0);
}

static void catch(const pid_t *pids, int count)
{
	for (int i = 0; i < count; i++)
		if (ptrace(PTRACE_SEIZE, pids[i], 0, PTRACE_O_TRACESYSGOOD) < 0 || ptrace(PTRACE_INTERRUPT, pids[i], 0, 0) < 0)
			fail("ptrace", errno);
	say("WATCHING", count);
	for (;;) {
		int status;
		pid_t pid = waitpid(-1, &status, __WALL);
		if (pid < 0)
			fail("waitpid", errno);
		if (!WIFSTOPPED(status))
			continue;
		if (WSTOPSIG(status) == SYSCALL_STOP && is_about_to_enter(pid)) {
			for (int i = 0; i < count; i++)
				if (pids[i] != pid)
					release(pids[i]);
			say("CAUGHT", pid);
			for (;;)
				pause();
		}
		int is_signal = WSTOPSIG(status) != SYSCALL_STOP && status >> 16 != PTRACE_EVENT_STOP;
		ptrace(PTRACE_SYSCALL, pid, 0, is_signal ? WSTOPSIG(status) : 0);
	}
}

int main(int argc, char **argv)
{
	pid_t pids[MOST_CAUGHT];
	int count = argc - 2;
	if (count < 1 || count > MOST_CAUGHT)
		return 2;
	for (int i = 0; i < count; i++)
		pids[i] = strtol(argv[i + 2], NULL, 10);
	if (!strcmp(argv[1], "delete"))
		send_command(UBLK_U_CMD_DEL_DEV, pids[0]);
	else if (!strcmp(argv[1], "stop"))
		send_command(UBLK_U_CMD_STOP_DEV, pids[0]);
	else if (!strcmp(argv[1], "reread"))
		reread(pids[0]);
	else if (!strcmp(argv[1], "catch"))
		catch(pids, count);
	else
		return 2;
	return 0;
}
