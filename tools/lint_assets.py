"""Checks the JavaScript files in kilonb/*/assets and tools/assets with eslint, which npx fetches from npm once.

Exits 0 with one sentence where Node.js is missing or the registry cannot be reached; 1 where eslint reports an error.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ESLINT = "eslint@9.39.1"
CONFIG = Path("tools") / "eslint.config.mjs"
FETCH_SECONDS = 180


def eslint(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run eslint in the repository's root, without npm's prompts and long retries."""
    quiet = {"npm_config_fetch_retries": "0", "npm_config_update_notifier": "false", "npm_config_fund": "false"}
    return subprocess.run(["npx", "--yes", ESLINT, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL,
                          env={**os.environ, **quiet}, **options)


def available() -> str:
    """Empty where eslint can be run, otherwise the reason why not."""
    if not shutil.which("node") or not shutil.which("npx"): return "Node.js is not installed"
    try: done = eslint("--version", capture_output=True, timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired: return f"npx did not fetch {ESLINT} within {FETCH_SECONDS} s"
    return "" if done.returncode == 0 else f"npx cannot fetch {ESLINT}"


def main() -> int:
    found = [*ROOT.glob("kilonb/*/assets/*.js"), *ROOT.glob("tools/assets/*.js")]
    scripts = sorted(path.relative_to(ROOT).as_posix() for path in found)
    if missing := available():
        print(f"JavaScript is not checked: {missing}.")
        return 0
    done = eslint("--config", CONFIG.as_posix(), "--max-warnings", "0", *scripts)
    if done.returncode == 0: print(f"eslint: {len(scripts)} JavaScript files, no errors")
    return min(done.returncode, 1)


if __name__ == "__main__": sys.exit(main())
