"""What encrypts secrets: several keys, none in sight, and nothing loaded that is not used."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.cipher import FILE, Cipher, CipherError, make_key_file, new_key
from app.settings import Settings

SECRET = "it is between us"


def test_what_is_encrypted_is_read_again_and_never_looks_the_same() -> None:
    cipher = Cipher((new_key(),))
    one, two = cipher.encrypt(SECRET), cipher.encrypt(SECRET)
    assert one != two
    assert cipher.decrypt(one) == cipher.decrypt(two) == SECRET
    assert SECRET.encode() not in one


def test_a_new_key_in_front_encrypts_while_the_old_one_still_decrypts() -> None:
    old, new = new_key(), new_key()
    kept = Cipher((old,)).encrypt(SECRET)
    both = Cipher((new, old))
    assert both.decrypt(kept) == SECRET
    assert not both.is_current(kept)
    again = both.encrypt(SECRET)
    assert both.is_current(again)
    assert Cipher((new,)).decrypt(again) == SECRET


@pytest.mark.parametrize("value", [b"", b"x", b"gAAAAA", bytes(range(256))])
def test_what_no_key_opens_is_one_sentence_without_a_key_in_it(value: bytes) -> None:
    key = new_key()
    with pytest.raises(CipherError, match=r"^BATON_SECRET_KEYS: has not the key") as caught:
        Cipher((key,)).decrypt(value)
    assert key not in str(caught.value)
    other = Cipher((new_key(),)).encrypt(SECRET)
    with pytest.raises(CipherError):
        Cipher((key,)).decrypt(other)


def test_a_key_is_asked_for_when_it_is_needed_and_not_before(tmp_path: Path) -> None:
    cipher = Cipher.from_settings(Settings(data_dir=tmp_path))
    with pytest.raises(CipherError, match="make a key with: baton integration new-key"):
        cipher.encrypt(SECRET)
    with pytest.raises(CipherError, match="make a key with"):
        cipher.decrypt(b"x")


def test_the_key_file_is_made_once_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    make_key_file(tmp_path)
    path = tmp_path / FILE
    made = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    make_key_file(tmp_path)
    assert path.read_text() == made
    assert [each.name for each in tmp_path.iterdir()] == [FILE]
    kept = Cipher.from_settings(Settings(data_dir=tmp_path)).encrypt(SECRET)
    path.write_text(f"{new_key()}\n{made}")  # as one rotates it there
    assert Cipher.from_settings(Settings(data_dir=tmp_path)).decrypt(kept) == SECRET


def test_a_key_of_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    make_key_file(tmp_path)
    key = new_key()
    kept = Cipher.from_settings(Settings(data_dir=tmp_path, secret_keys=(key,))).encrypt(SECRET)
    assert Cipher((key,)).decrypt(kept) == SECRET


@pytest.mark.parametrize("content", ["", "short", f"{'A' * 43}=,hunter2"])
def test_a_key_file_that_is_none_is_told_by_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CipherError, match="must hold keys as") as caught:
        Cipher.from_settings(Settings(data_dir=tmp_path))
    assert str(tmp_path / FILE) in str(caught.value) and "hunter2" not in str(caught.value)


def test_the_http_process_does_not_load_the_library_before_it_is_used() -> None:
    code = (
        "import sys, app.main, app.cipher; from app.settings import Settings;"
        "app.cipher.Cipher(('A' * 43 + '=',)); print('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
