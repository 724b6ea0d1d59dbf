"""Prints whether the key that the test has made is in this session's keyring."""

import ctypes
import os

keyctl = {"x86_64": 250}.get(os.uname().machine, 219)
search, session = ctypes.c_long(10), ctypes.c_long(-3)
print(ctypes.CDLL(None).syscall(keyctl, search, session, b"user", b"cpodfs-test", None) > 0)
