"""Signatures of manifests in OpenSSH's format, made and checked by OpenSSH itself (ssh-keygen).

The manifest holds the hashes of all other files, so who signs it signs the artifact.
"""

import shutil
import subprocess
from pathlib import Path

from regcache.compiler.job.staging import MANIFEST
from regcache.passes.errors import InputError, first_line
from regcache.passes.temporary import temporary_folder

SIGNATURE = f"{MANIFEST}.sig"
"""The file in an artifact that holds the signature of its manifest."""
# What the signature is for, and whose it is: the key alone decides.
_NAMESPACE, _WHO = "regcache", "signer"
_KINDS = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")


def check_signing_key(key: Path) -> None:
    """Raise InputError where there is no such key, or nothing that signs."""
    if not key.is_file():
        raise InputError(f"{key}: no such file to sign with")
    _ssh_keygen()


def check_signable(folder: Path, key: Path | None) -> None:
    """Raise InputError where a signed artifact would lose its signature, or no key signs."""
    if key is not None:
        check_signing_key(key)
    elif (folder / SIGNATURE).exists():
        raise InputError(f"{folder}: is signed, and a change would break that: give --sign KEY")


def sign(folder: Path, key: Path) -> None:
    """Sign the manifest in an artifact's folder with a private key, or a public one of ssh-agent's.

    Raises InputError where the key cannot be used.
    """
    (folder / SIGNATURE).unlink(missing_ok=True)  # ssh-keygen would ask whether it may replace it
    command = [_ssh_keygen(), "-Y", "sign", "-q", "-f", str(key), "-n", _NAMESPACE]
    done = subprocess.run(
        [*command, str(folder / MANIFEST)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"{key}: cannot sign: {first_line(RuntimeError(done.stderr))}")


def verify(folder: Path, content: bytes, public_key: Path) -> None:
    """Raise InputError unless the artifact's signature is one of its manifest, by that key.

    `content`: the manifest's bytes as they are going to be believed. `public_key`: a file with one
    key, as `ssh-keygen` writes it beside the private one.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise InputError(f"{folder}: is not signed")
    with temporary_folder() as scratch:
        allowed = scratch / "allowed"
        allowed.write_text(f"{_WHO} {_read_key(public_key)}\n", encoding="utf-8")
        command = [_ssh_keygen(), "-Y", "verify", "-f", str(allowed), "-I", _WHO]
        done = subprocess.run(
            [*command, "-n", _NAMESPACE, "-s", str(signature)],
            input=content,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise InputError(f"{folder}: was not signed by the key of {public_key}")


def _read_key(path: Path) -> str:
    """Kind and key, without the comment: nothing else in the file is believed."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a public key") from error
    if len(words) < 2 or not words[0].startswith(_KINDS):
        raise InputError(f"{path}: is no public key of OpenSSH's, such as id_ed25519.pub")
    return " ".join(words[:2])


def _ssh_keygen() -> str:
    found = shutil.which("ssh-keygen")
    if found is None:
        raise InputError("signatures need ssh-keygen, of OpenSSH 8.2 or later")
    return found
