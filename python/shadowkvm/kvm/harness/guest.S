# The guest's code: one supervisor page (RT, gva = gpa = 0x7000) and one user page (USER, 0x8000).
# Stubs, IDT, GDT, TSS and stack share RT, so an op costs no other accesses than its own and those to these two pages.
# Each stub is one instruction under test and a way out: hlt (supervisor) or syscall (user; LSTAR points at the hlt at RT+0).
# Labels tell the rest of the harness where things are: <cpl>_<kind><size> the instruction, <same>_end the way out.
#   rbx = address, rdx = value, rax = expected value (cmpxchg) or value (stos), rdi = address (stos)

.macro out cpl
  .ifc \cpl,k
    hlt
  .else
    syscall
  .endif
.endm

.macro stub cpl, name, insn:vararg
  .balign 8
\cpl\()_\name:  \insn
\cpl\()_\name\()_end: out \cpl
.endm

.macro stubs cpl
  stub \cpl, read1, movb (%rbx), %dl
  stub \cpl, read2, movw (%rbx), %dx
  stub \cpl, read4, movl (%rbx), %edx
  stub \cpl, read8, movq (%rbx), %rdx
  stub \cpl, write1, movb %dl, (%rbx)
  stub \cpl, write2, movw %dx, (%rbx)
  stub \cpl, write4, movl %edx, (%rbx)
  stub \cpl, write8, movq %rdx, (%rbx)
  stub \cpl, or4, lock orl %edx, (%rbx)
  stub \cpl, or8, lock orq %rdx, (%rbx)
  stub \cpl, and4, lock andl %edx, (%rbx)
  stub \cpl, and8, lock andq %rdx, (%rbx)
  stub \cpl, xor4, lock xorl %edx, (%rbx)
  stub \cpl, xor8, lock xorq %rdx, (%rbx)
  stub \cpl, add4, lock addl %edx, (%rbx)
  stub \cpl, add8, lock addq %rdx, (%rbx)
  stub \cpl, xchg4, xchgl %edx, (%rbx)
  stub \cpl, xchg8, xchgq %rdx, (%rbx)
  stub \cpl, cmpxchg4, lock cmpxchgl %edx, (%rbx)
  stub \cpl, cmpxchg8, lock cmpxchgq %rdx, (%rbx)
  stub \cpl, stos4, stosl
  stub \cpl, stos8, stosq
  stub \cpl, movnti4, movntil %edx, (%rbx)
  stub \cpl, movnti8, movntiq %rdx, (%rbx)
  .balign 16
\cpl\()_rep8_setup: mov %edx, %ecx           # sysret takes the user RIP from rcx, so the count comes in rdx
  stub \cpl, rep8, rep stosq
  .balign 8
\cpl\()_fetch: jmp *%rbx                      # the target must hold 0f 05 (syscall)
.endm

    .code64
    .org 0
k_hlt:      hlt
    .org 0x010
    stubs k
    stub k, invlpg, invlpg (%rbx)
    stub k, cr0, mov %rbx, %cr0
    stub k, cr3, mov %rbx, %cr3
    stub k, cr4, mov %rbx, %cr4
    stub k, efer, wrmsr                        # rcx = 0xc0000080, rdx:rax = value
    .balign 8
k_user:     sysretq                            # rcx = user RIP, r11 = RFLAGS
    .balign 16
pf_entry:   hlt                                # error code on top of the stack
    .balign 16
gp_entry:   hlt
    .balign 16
other_entry: hlt                               # no test provokes these; the run is given up
    .org 0x800                                 # GDT (the assembler refuses stubs that run into it)
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
    .org 0x900                                 # IDT, vectors 0 to 15
    .irp entry, other, other, other, other, other, other, other, other, other, other, other, other, other, gp, pf, other
    .word \entry\()_entry - k_hlt + 0x7000, 8, 0x8e00, 0
    .quad 0
    .endr
    .org 0xa04                                 # TSS: RSP0
    .quad 0x7ff0
    .org 0x1000
    stubs u
    stub u, push8, push %rdx                   # user only: a #PF at CPL 0 would be delivered on this very stack
    .org 0x2000
