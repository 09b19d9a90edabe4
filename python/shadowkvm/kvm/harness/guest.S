# The 64-bit guest's code; what it shares with guest32.S, also their pages, stands in stubs.inc.
# Stubs, IDT, GDT, TSS and stack lie on RT, so an op costs no other accesses than its own and those to these two pages.
# A user op goes out by sysret and comes back by syscall: LSTAR points at the hlt at RT+0.

    .include "stubs.inc"
    a = %rbx
    b = %rdi
    c = %rbx
    d1 = %dl
    d2 = %dx
    d4 = %edx
    d8 = %rdx

.macro out cpl
  .ifc \cpl,k
    hlt
  .else
    syscall
  .endif
.endm

.macro stubs64 cpl
  stubs \cpl
  sized \cpl, 8, q
  prepared \cpl, cmpxchg16b16, "mov %rsi, %rcx", lock cmpxchg16b (b)
  prepared \cpl, cmpxchg16b16_, "mov %rsi, %rcx", cmpxchg16b (b)
  stub \cpl, push8, push %rdx
.endm

    .code64
    .org 0
k_back:     hlt
    .balign 8
    stubs64 k
    supervisor_stubs
    stub k, idt, lidt idtr(%rip)
    .balign 8
k_user:     sysretq                            # rcx = user RIP, r11 = RFLAGS
    .irp entry, pf, gp, df
    .balign 8
\entry\()_entry: pop %rax                      # error code
    pop %rcx                                   # RIP
\entry\()_hlt: hlt
    .endr
    .balign 8
bp_entry:   pop %rcx
bp_hlt:     hlt
    .balign 8
other_entry: hlt                               # no test provokes these; the run is given up
code64_end:
    .org 0x800                                 # the GDT of both modes: code (64-bit), data, user data, user code, code and user code (32-bit)
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0x00cf9b000000ffff, 0x00cffb000000ffff
gdt_end:
    .org 0x900                                 # vectors 0 to 15
idt:
    .irp entry, other, other, other, bp, other, other, other, other, df, other, other, other, other, gp, pf, other
    .word \entry\()_entry - k_back + 0x7000, 8
    .ifc \entry,bp
    .word 0xee00                               # CPL 3 may execute INT3
    .else
    .ifc \entry,df
    .word 0x8e01                               # on a stack of its own
    .else
    .word 0x8e00
    .endif
    .endif
    .word 0
    .quad 0
    .endr
idt_end:
    .org 0xa00
tss:
    .long 0
    .quad 0x7ff0, 0, 0, 0                      # RSP0 to RSP2
    .quad 0x7f80                               # IST1
    .org 0xa68
idtr:                                          # what the stub of LIDT loads: limit, base
    .word 0
    .quad 0
    .org 0x1000
    stubs64 u
    .org 0x2000
