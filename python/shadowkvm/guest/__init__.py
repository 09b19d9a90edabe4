"""A small guest operating system: calls such as mmap and fork become the rows of a trace.

`Linux` is the whole; `Settings` are its parts. docs/guests.md shows what it models and what not.
"""

from __future__ import annotations

from shadowkvm.guest.layout import LAYOUTS, Layout
from shadowkvm.guest.linux import Linux, pages
from shadowkvm.guest.machine import Settings
from shadowkvm.guest.task import File, Mm, Process, Program, Vma

__all__ = ["LAYOUTS", "File", "Layout", "Linux", "Mm", "Process", "Program", "Settings", "Vma", "pages"]
