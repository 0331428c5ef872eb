"""A stand-in for apt-get and dpkg-deb."""

from __future__ import annotations

import io
import sys
import tarfile

# Replaces apt-get and dpkg-deb: packages are tar files in $FAKE/repo, calls are logged, $FAKE/mode selects a failure.
FAKE_TOOL = """#!{python}
import os, shutil, sys, tarfile, time
fake = {fake!r}
mode = open(fake + "/mode").read() if os.path.exists(fake + "/mode") else ""
with open(fake + "/log", "a") as log:
    print(os.path.basename(sys.argv[0]), *sys.argv[1:], file=log)
def end(code, *lines):
    print(*lines, sep="\\n", file=sys.stderr)
    sys.exit(code)
if sys.argv[0].endswith("dpkg-deb"):
    assert sys.argv[1] == "-x"
    if mode == "broken deb":
        end(2, "dpkg-deb: error: archive has premature member")
    tarfile.open(sys.argv[2]).extractall(sys.argv[3])
    if mode == "slow":
        time.sleep(60)
    sys.exit(0)
lists = [a.split("=", 1)[1] for a in sys.argv if a.startswith("Dir::State::lists=")]
if mode == "hang":
    time.sleep(60)
if sys.argv[1] == "update":
    if mode == "offline":
        end(0, "W: Failed to fetch http://deb/InRelease  Temporary failure resolving 'deb'", "W: Some index files")
    open(lists[0] + "/deb_dists_main_Packages", "w").close()
    if mode == "one source fails":
        end(100, "E: Failed to fetch http://other/Release  404  Not Found", "E: Some index files failed to download")
    sys.exit(0)
assert sys.argv[1] == "download"
name = sys.argv[2]
if mode == "no lists" and not lists:
    end(100, "E: Unable to locate package " + name)
if mode in ("stale lists", "one source fails") and not lists:
    end(100, "Err:1 http://deb x.deb", "E: Failed to fetch http://deb/x.deb  404  Not Found")
if mode == "offline":
    end(100, "E: Failed to fetch http://deb/x.deb  Temporary failure resolving 'deb'")
if mode == "disk full":
    end(100, "E: Write error - write (28: No space left on device)")
if not os.path.exists(fake + "/repo/" + name):
    end(100, "Reading package lists...", "E: Unable to locate package " + name)
shutil.copy(fake + "/repo/" + name, name + "_1%3a2_all.deb")
"""


class FakeApt:
    """Programs apt-get and dpkg-deb in ``FOLDER/bin``, with the packages that ``add`` puts into ``FOLDER/repo``."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "repo").mkdir(parents=True)
        (folder / "bin").mkdir()
        for tool in ("apt-get", "dpkg-deb"):
            (folder / "bin" / tool).write_text(FAKE_TOOL.format(python=sys.executable, fake=str(folder)))
            (folder / "bin" / tool).chmod(0o755)

    def add(self, package, files):
        with tarfile.open(self.folder / "repo" / package, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def mode(self, mode):
        (self.folder / "mode").write_text(mode)

    def calls(self):
        log = self.folder / "log"
        lines = [line.split()[:3] for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return [" ".join(line[:3] if line[1] == "download" else line[:2]) for line in lines]
