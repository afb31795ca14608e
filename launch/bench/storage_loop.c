// Random direct reads through io_uring, as fast as C asks for them: prints wall and CPU seconds.
//
//     loop FILE DEPTH READS BYTES SEED
//
// Plain system calls, so that nothing but a compiler is needed. The queue is kept full; a quarter of it is waited for.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SETUP = 425, ENTER = 426, ROW = 256 };

static double wall_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

static double cpu_seconds(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return used.ru_utime.tv_sec + used.ru_stime.tv_sec + 1e-6 * (used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static void fail(const char* what) {
  perror(what);
  exit(1);
}

int main(int count, char** values) {
  if (count != 6) return fprintf(stderr, "usage: loop FILE DEPTH READS BYTES SEED\n"), 2;
  const unsigned depth = atoi(values[2]), bytes = atoi(values[4]);
  const long reads = atol(values[3]);
  uint64_t state = strtoull(values[5], 0, 10) * 0x9E3779B97F4A7C15ull + 1;
  const int file = open(values[1], O_RDONLY | O_DIRECT);
  struct stat about;
  if (file < 0 || fstat(file, &about)) fail(values[1]);
  const uint64_t blocks = about.st_size / bytes;

  struct io_uring_params params;
  // One thread hands over, and completions are worked off when it waits: the fastest a kernel offers.
  const unsigned setups[] = {1u << 12 | 1u << 13, 1u << 8, 0};
  int ring = -1;
  for (int i = 0; i < 3 && ring < 0; ++i) {
    memset(&params, 0, sizeof params);
    params.flags = setups[i];
    ring = syscall(SETUP, depth, &params);
  }
  if (ring < 0) fail("io_uring_setup");
  size_t size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  const size_t other = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
  if (other > size) size = other;
  const int access = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_POPULATE;
  char* shared = mmap(0, size, access, kind, ring, IORING_OFF_SQ_RING);
  struct io_uring_sqe* requests = mmap(0, params.sq_entries * sizeof *requests, access, kind, ring, IORING_OFF_SQES);
  char* memory = mmap(0, (size_t)depth * bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  char* rows = malloc((size_t)reads * ROW);
  unsigned* unused = malloc(depth * sizeof *unused);
  if (shared == MAP_FAILED || requests == MAP_FAILED || memory == MAP_FAILED || !rows || !unused) fail("memory");
  unsigned *sq_tail = (unsigned*)(shared + params.sq_off.tail), *order = (unsigned*)(shared + params.sq_off.array);
  unsigned *cq_head = (unsigned*)(shared + params.cq_off.head), *cq_tail = (unsigned*)(shared + params.cq_off.tail);
  struct io_uring_cqe* completions = (struct io_uring_cqe*)(shared + params.cq_off.cqes);
  for (unsigned i = 0; i < params.sq_entries; ++i) order[i] = i;
  for (unsigned i = 0; i < depth; ++i) unused[i] = i;

  unsigned tail = *sq_tail, free_slots = depth;
  const unsigned quarter = depth / 4 ? depth / 4 : 1, part = bytes < ROW ? bytes : ROW;
  long asked = 0, done = 0;
  const double wall = wall_seconds(), cpu = cpu_seconds();
  while (done < reads) {
    unsigned fresh = 0;
    for (; free_slots && asked < reads; ++fresh, ++asked, ++tail) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      const unsigned slot = unused[--free_slots];
      struct io_uring_sqe* request = requests + (tail & (params.sq_entries - 1));
      memset(request, 0, sizeof *request);
      request->opcode = IORING_OP_READ;
      request->fd = file;
      request->off = (state >> 20) % blocks * bytes;
      request->addr = (uint64_t)(memory + (size_t)slot * bytes);
      request->len = bytes;
      request->user_data = slot;
    }
    __atomic_store_n(sq_tail, tail, __ATOMIC_RELEASE);
    const unsigned flying = depth - free_slots;
    if (syscall(ENTER, ring, fresh, quarter < flying ? quarter : flying, IORING_ENTER_GETEVENTS, 0, 0) < 0)
      fail("io_uring_enter");
    unsigned head = *cq_head;
    const unsigned end = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
    for (; head != end; ++head, ++done) {
      const struct io_uring_cqe* one = completions + (head & (params.cq_entries - 1));
      if (one->res != (int)bytes) return fprintf(stderr, "a read gave %d\n", one->res), 1;
      memcpy(rows + done * ROW, memory + (size_t)one->user_data * bytes, part);
      unused[free_slots++] = one->user_data;
    }
    __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
  }
  printf("%.9f %.9f\n", wall_seconds() - wall, cpu_seconds() - cpu);
  return 0;
}
