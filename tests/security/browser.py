"""Open a page in a real browser: its DOM, its requests, its console messages."""

import functools
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Each attack that works puts the word `owned` into the title, the console, or a request to the server.
ATTACKS = (
    "<script>document.title='owned'; console.log('owned'); fetch('/owned')</script>",
    "</div></pre></td><img src=/owned onerror=\"document.title='owned'; console.log('owned')\">",
    "<svg onload=\"console.log('owned')\"><a href=\"javascript:console.log('owned')\" id=x>x</a></svg>",
    "<iframe src=/owned></iframe><object data=/owned></object><embed src=/owned>",
    '<meta http-equiv=refresh content="0;url=/owned"><base href=/owned/><link rel=stylesheet href=/owned>',
    "<form action=/owned><button autofocus onfocus=\"console.log('owned')\">go</button></form>",
    "<style>body { background: url(/owned) } </style><p style=\"background:url('/owned')\">",
    "[click](javascript:alert(1)) ![i](/owned) <javascript:alert(1)>",
    "&#60;script&#62;console.log('owned')&#60;/script&#62;",
    "{{ 7 * 7 }} {% include '/etc/passwd' %} \x1b]0;owned\x07 \u202e",
)


@dataclass(frozen=True)
class Visit:
    """A browser's visit of a page."""

    dom: str
    requested_paths: tuple[str, ...]
    console: str


def visit(page: Path) -> Visit:
    """Open `page`, served from its folder, and run its scripts for two seconds of the browser's virtual time."""
    requested_paths: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            requested_paths.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(page.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        # The profile holds a socket, whose path is limited to 107 bytes; so its path is short, whatever TMPDIR says.
        with tempfile.TemporaryDirectory(prefix="chromium-", dir="/tmp") as profile:
            shown = subprocess.run(
                [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom",
                 f"http://127.0.0.1:{server.server_port}/{page.name}"],
                capture_output=True, text=True, timeout=180, check=False, env=os.environ | {"TMPDIR": profile},
            )  # fmt: skip
        assert shown.returncode == 0, shown.stderr[-4000:]
    finally:
        server.shutdown()
    return Visit(
        shown.stdout, tuple(requested_paths), "\n".join(line for line in shown.stderr.splitlines() if "CONSOLE" in line)
    )
