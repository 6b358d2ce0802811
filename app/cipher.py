"""Encrypts what the database keeps for others: the secrets and tokens of integrations.

Fernet of `cryptography` (AES-128-CBC and HMAC-SHA-256), with several keys at once, so that one can
be replaced while everything works: the first encrypts, all decrypt. The database never has a key,
so a dump of it is of no use to who finds it.

The keys are BATON_SECRET_KEYS, else the file `secret_keys` of BATON_DATA_DIR, which `baton run`
makes beside the embedded PostgreSQL. Who needs none is not asked for one, and does not load the
library.
"""

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from app.settings import SECRET_KEY, Settings

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

FILE = "secret_keys"  # in BATON_DATA_DIR, as in the variable; lines may part the keys too


class CipherError(Exception):
    """The keys do not do; the message says in one sentence what is wrong, and holds no key."""


class Cipher:
    """What encrypts and decrypts. It is free until it is used.

    Args:
        keys: Fernet keys; the first encrypts, all decrypt.
        origin: of the keys, to name it when they do not do.
    """

    def __init__(self, keys: tuple[str, ...], origin: str = "BATON_SECRET_KEYS") -> None:
        self._keys = keys
        self._origin = origin
        self._made: MultiFernet | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "Cipher":
        """The keys of the environment, else of the data directory; one without keys can do nothing.

        Raises:
            CipherError: the file of the data directory is there but does not do.
        """
        if settings.secret_keys:
            return cls(settings.secret_keys)
        path = settings.data_dir / FILE
        return cls(_read(path), str(path))

    def encrypt(self, text: str) -> bytes:
        """Encrypt with the first key; twice is never the same.

        Raises:
            CipherError: there is no key.
        """
        return self._fernet().encrypt(text.encode())

    def decrypt(self, value: bytes) -> str:
        """What was encrypted with any of the keys.

        Raises:
            CipherError: there is no key, or not the one that this was encrypted with.
        """
        from cryptography.fernet import InvalidToken

        try:
            return self._fernet().decrypt(value).decode()
        except InvalidToken:
            raise CipherError(
                f"{self._origin}: has not the key that a stored secret was encrypted with; add it"
                " again, or rotate the secret of the integration."
            ) from None

    def is_current(self, value: bytes) -> bool:
        """Was this encrypted with the first key, so that the others are not needed for it?"""
        from cryptography.fernet import Fernet, InvalidToken

        try:
            Fernet(self._keys[0]).decrypt(value)
        except (IndexError, InvalidToken):
            return False
        return True

    def _fernet(self) -> "MultiFernet":
        if self._made is None:
            if not self._keys:
                raise CipherError(
                    "BATON_SECRET_KEYS: is needed for the secrets of integrations; make a key with:"
                    " baton integration new-key"
                )
            # 10 MB that a process without integrations need not have
            from cryptography.fernet import Fernet, MultiFernet

            self._made = MultiFernet([Fernet(key) for key in self._keys])
        return self._made


def new_key() -> str:
    """A new key, such as BATON_SECRET_KEYS names."""
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def make_key_file(data_dir: Path) -> None:
    """Make a key for this data directory, unless it has one; only its owner can read it.

    Raises:
        OSError: it cannot be written.
    """
    path = data_dir / FILE
    if path.exists():
        return
    part = data_dir / f"{FILE}.{secrets.token_hex(4)}"
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{new_key()}\n")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[str, ...]:
    try:
        keys = tuple(re.split(r"[\s,]+", path.read_text().strip()))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise CipherError(f"{path}: cannot be read ({type(error).__name__}).") from None
    if not all(re.fullmatch(SECRET_KEY, key) for key in keys):
        raise CipherError(
            f"{path}: must hold keys as `baton integration new-key` prints them, the newest first."
        )
    return keys
