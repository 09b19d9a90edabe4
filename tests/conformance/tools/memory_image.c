// Init of the machine that memory_image.py takes a picture of: processes whose address spaces have every kind of mapping,
// which run for ever so that each of them is the current one now and then. No C library, so that one source serves
// 64-bit and 32-bit kernels:
//
//     gcc -m64|-m32 -O1 -ffreestanding -fno-stack-protector -fno-pic -nostdlib -static -o init memory_image.c

typedef unsigned long word;

enum { READ = 1, WRITE = 2, EXEC = 4, SHARED = 1, PRIVATE = 2, ANONYMOUS = 0x20, HUGE_PAGES = 14 };

#ifdef __x86_64__
enum { SYS_WRITE = 1, SYS_MMAP = 9, SYS_MPROTECT = 10, SYS_MADVISE = 28, SYS_FORK = 57 };
static long call(long n, long a, long b, long c, long d, long e)
{
    long out;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall" : "=a"(out) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return out;
}
#else
// The sixth argument (the offset) travels in EBP, which the compiler keeps for itself: it is pushed, set to 0 and popped.
enum { SYS_WRITE = 4, SYS_MMAP = 192, SYS_MPROTECT = 125, SYS_MADVISE = 219, SYS_FORK = 2 };
static long call(long n, long a, long b, long c, long d, long e)
{
    long out;
    __asm__ volatile("push %%ebp; xor %%ebp, %%ebp; int $0x80; pop %%ebp"
                     : "=a"(out) : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
    return out;
}
#endif

static volatile char *map(word hint, word size, int rights, int kind)
{
    return (volatile char *)call(SYS_MMAP, hint, size, rights, kind | ANONYMOUS, -1);
}

static void touch(volatile char *at, word size, word step, int write)
{
    for (word i = 0; i < size; i += step) {
        if (write)
            at[i] = 1;
        else
            (void)at[i];
    }
}

static void say(const char *text, word length) { call(SYS_WRITE, 1, (long)text, length, 0, 0); }

// Pages that are dirty, clean, the zero page, read-only after a write, without rights after a write, executable,
// shared, and never touched; and one large page where the kernel has them.
static void fill(word page)
{
    word many = 96 * page;
    touch(map(0, many, READ | WRITE, PRIVATE), many, page, 1);
    touch(map(0, many, READ | WRITE, PRIVATE), many, page, 0);
    touch(map(0, many, READ | WRITE, SHARED), many, 3 * page, 1);
    touch(map(0, many, READ | EXEC, PRIVATE), many, page, 0);
    volatile char *frozen = map(0, many, READ | WRITE, PRIVATE), *hidden = map(0, many, READ | WRITE, PRIVATE);
    touch(frozen, many, page, 1);
    touch(hidden, many, page, 1);
    call(SYS_MPROTECT, (long)frozen, many, READ, 0, 0);
    call(SYS_MPROTECT, (long)hidden, many, 0, 0, 0);
    word huge = 4ul << 20;
    volatile char *large = map(0, 3 * huge, READ | WRITE, PRIVATE);
    call(SYS_MADVISE, (long)large, 3 * huge, HUGE_PAGES, 0, 0);
    touch(large, 2 * huge, huge / 4, 1);
}

// One page each in places far apart; the last is beyond 47 bits, for kernels with 5-level paging.
static void scatter(word page)
{
    for (word bit = 23; bit < sizeof(word) * 8 - (sizeof(word) == 8 ? 8 : 1); bit += 2)
        touch(map(1ul << bit, page, READ | WRITE, PRIVATE), page, page, 1);
}

__attribute__((used)) static void begin(void)
{
    word page = 4096;
    fill(page);
    scatter(page);
    volatile char *both = map(0, 64 * page, READ | WRITE, PRIVATE);
    touch(both, 64 * page, page, 1);
    long child = call(SYS_FORK, 0, 0, 0, 0, 0);
    // Half of what both have is copied by the writer; the other half stays shared and write-protected.
    touch(both, 32 * page, page, 1);
    if (child == 0) {
        fill(page);
        say("READY\n", 6);
    }
    for (;;)
        touch(both, 32 * page, page, 1);
}

// The kernel enters with a stack that is aligned for a call.
__asm__(".globl _start\n_start: call begin\n");
