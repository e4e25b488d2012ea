"""Becomes Postgres: run as a script of its own (`python -I -S postgres_exec.py MODE PARENT DIRECTORY PROGRAM …`).

Postgres refuses to run as root, and a user that we would switch to could not reach a data directory below
`/root`. MODE says how root gets around both, with nothing copied and no account made:

plain   no root: exec as it is.
userns  a user namespace in which our uid is 65534; the kernel still sees us as the owner of our files.
caps    where namespaces are refused (containers): really uid 65534, with CAP_DAC_OVERRIDE and
        CAP_DAC_READ_SEARCH kept as ambient capabilities, so that it reaches files wherever they are.

A script, not `preexec_fn`: that is unsafe beside threads. Imports the standard library only. Exit code 97 means
that the mode does not work here; its reason is on stderr.
"""

import ctypes
import os
import signal
import sys

UNUSABLE = 97
NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITIES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_CAPABILITY_VERSION_3 = 0x20080522


def main(argv: list[str]) -> None:
    mode, parent, directory, *command = argv
    try:
        if mode == "userns":
            _enter_user_namespace()
            if not os.access(directory, os.W_OK):  # somebody else's: no capability helps in here
                raise PermissionError(13, "not writable in this mode", directory)
        elif mode == "caps":
            _become_nobody_with_file_access()
        os.chdir(directory)
        _die_with(int(parent))
        os.execv(command[0], command)  # noqa: S606 - the point of this script
    except OSError as error:
        sys.stderr.write(f"{mode}: {error}\n")
        os._exit(UNUSABLE)


def _prctl(option: int, second: int, third: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, second, third, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _die_with(parent: int) -> None:
    """A parent that is killed takes Postgres with it: SIGINT is its fast shutdown. Set last, because a change of
    credentials clears it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != parent:
        os._exit(UNUSABLE)


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    os.unshare(os.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("gid_map", f"{NOBODY} {gid} 1"),
        ("uid_map", f"{NOBODY} {uid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib costs 10 ms of start-up
            file.write(text)


def _become_nobody_with_file_access() -> None:
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    mask = sum(1 << capability for capability in _CAPABILITIES)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable, twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, sets) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    for capability in _CAPABILITIES:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


if __name__ == "__main__":
    main(sys.argv[1:])
