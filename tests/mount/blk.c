/* A disk with a volatile write cache, as one file in a FUSE mount ("disk"), for a loop device.
 *
 * A write goes to a list of pending 4 KiB blocks; an fsync of the file, which is what a loop device
 * makes of a flush, makes all of them durable. Commands are written to the file "ctl":
 *   cut SEED P    loss of power: each pending block survives with probability P percent (in the order
 *                 of writing; 0: only what was flushed; 100: all). From now on writes and fsync are
 *                 EIO, reads show the state before.
 *   on            power is back: the disk is what the cut left.
 *   refuse TEXT   from now on a write in which these bytes are is EIO, as of a bad sector; without
 *                 TEXT none is any more.
 * Reading "ctl" gives counters. Single-threaded (-s), so each command is atomic.
 */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <errno.h>
#include <fuse.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#define BLOCK ((size_t)4096)

static struct { unsigned size_mib; } conf = {192};
static const struct fuse_opt options[] = {{"--size=%u", 0, 0}, FUSE_OPT_END};

struct pending { size_t block; int survives; unsigned char data[BLOCK]; };
static unsigned char *durable;
static size_t size;
static struct pending **list, **latest; /* latest[block]: its newest pending version, or NULL */
static size_t count, room;
static int dead;
static char refused[64];
static unsigned long flushes, writes, cuts, kept, lost;

static unsigned char *seen(size_t block) {
  return latest[block] ? latest[block]->data : durable + block * BLOCK;
}

static void settle(int all) {
  for (size_t i = 0; i < count; i++) {
    if (all || list[i]->survives) memcpy(durable + list[i]->block * BLOCK, list[i]->data, BLOCK);
    latest[list[i]->block] = NULL;
  }
  for (size_t i = 0; i < count; i++) free(list[i]);
  count = 0;
}

static int disk_getattr(const char *path, struct stat *st, struct fuse_file_info *fi) {
  (void)fi;
  memset(st, 0, sizeof *st);
  st->st_nlink = 1;
  st->st_mode = S_IFREG | 0600;
  if (!strcmp(path, "/")) st->st_mode = S_IFDIR | 0700;
  else if (!strcmp(path, "/disk")) st->st_size = size;
  else if (strcmp(path, "/ctl")) return -ENOENT;
  return 0;
}

static int disk_open(const char *path, struct fuse_file_info *fi) {
  (void)path;
  fi->direct_io = 1;
  return 0;
}

static int read_counters(char *out, size_t n, off_t offset) {
  char text[200];
  int length = snprintf(text, sizeof text,
      "dead=%d pending=%zu flushes=%lu writes=%lu cuts=%lu kept=%lu lost=%lu\n",
      dead, count, flushes, writes, cuts, kept, lost);
  if (offset >= length) return 0;
  if (n > (size_t)(length - offset)) n = length - offset;
  memcpy(out, text + offset, n);
  return n;
}

/* How much of what is left of a transfer is in one block. */
static size_t part(size_t offset, size_t left) {
  size_t rest = BLOCK - offset % BLOCK;
  return rest < left ? rest : left;
}

static int disk_read(const char *path, char *out, size_t n, off_t offset, struct fuse_file_info *fi) {
  (void)fi;
  if (!strcmp(path, "/ctl")) return read_counters(out, n, offset);
  if ((size_t)offset >= size) return 0;
  if (offset + n > size) n = size - offset;
  for (size_t done = 0, step; done < n; done += step) {
    size_t at = offset + done;
    step = part(at, n - done);
    memcpy(out + done, seen(at / BLOCK) + at % BLOCK, step);
  }
  return n;
}

static int command(const char *text) {
  unsigned long seed;
  unsigned percent;
  if (sscanf(text, "cut %lu %u", &seed, &percent) == 2 && !dead) {
    srandom(seed);
    for (size_t i = 0; i < count; i++) {
      list[i]->survives = (unsigned)(random() % 100) < percent;
      list[i]->survives ? kept++ : lost++;
    }
    dead = 1;
    cuts++;
    return 0;
  }
  if (!strncmp(text, "on", 2) && dead) {
    settle(0);
    dead = 0;
    return 0;
  }
  if (!strncmp(text, "refuse ", 7)) {
    snprintf(refused, sizeof refused, "%s", text + 7);
    return 0;
  }
  return -EINVAL;
}

static int disk_write(const char *path, const char *data, size_t n, off_t offset, struct fuse_file_info *fi) {
  (void)fi;
  if (!strcmp(path, "/ctl")) {
    char text[100] = {0};
    memcpy(text, data, n < sizeof text ? n : sizeof text - 1);
    int error = command(text);
    return error ? error : (int)n;
  }
  if (dead || (*refused && memmem(data, n, refused, strlen(refused)))) return -EIO;
  if (offset + n > size) return -ENOSPC;
  writes++;
  for (size_t done = 0, step; done < n; done += step) {
    size_t at = offset + done;
    step = part(at, n - done);
    struct pending *one = malloc(sizeof *one);
    if (count == room) list = realloc(list, (room = room ? room * 2 : 1024) * sizeof *list);
    if (!one || !list) abort();
    one->block = at / BLOCK;
    one->survives = 0;
    memcpy(one->data, seen(at / BLOCK), BLOCK);
    memcpy(one->data + at % BLOCK, data + done, step);
    list[count++] = latest[at / BLOCK] = one;
  }
  return n;
}

static int disk_fsync(const char *path, int datasync, struct fuse_file_info *fi) {
  (void)datasync, (void)fi;
  if (strcmp(path, "/disk")) return 0;
  if (dead) return -EIO;
  flushes++;
  settle(1);
  return 0;
}

static int disk_truncate(const char *path, off_t length, struct fuse_file_info *fi) {
  (void)path, (void)length, (void)fi; /* the shell's > of a command */
  return 0;
}

static const struct fuse_operations operations = {
    .getattr = disk_getattr, .open = disk_open, .read = disk_read, .write = disk_write,
    .fsync = disk_fsync, .truncate = disk_truncate};

int main(int argc, char **argv) {
  struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
  if (fuse_opt_parse(&args, &conf, options, 0)) return 1;
  size = (size_t)conf.size_mib << 20;
  durable = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  latest = calloc(size / BLOCK, sizeof *latest);
  if (durable == MAP_FAILED || !latest) return 1;
  return fuse_main(args.argc, args.argv, &operations, 0);
}
