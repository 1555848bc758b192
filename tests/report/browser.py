"""A headless Chromium for tests, driven by the HTTP protocol of chromedriver (W3C WebDriver)."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of the standard
KEYS = {"Escape": "\ue00c", "ArrowRight": "\ue014"}


def missing_browser() -> str | None:
    """Why there can be no browser here, or None."""
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser is installed here: none of {', '.join(BROWSERS)} is on the PATH"
    if not shutil.which("chromedriver"):
        return "chromedriver, which drives the browser, is not on the PATH"
    return None


class Browser:
    """One window; use it as a context."""

    def __init__(self, width: int = 1400, height: int = 1000) -> None:
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            line = next(line for line in self.driver.stdout if "started successfully on port" in line)
            port = line.strip().rstrip(".").rsplit(" ", 1)[1]
            self.address = f"http://127.0.0.1:{port}/session"
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            arguments += [f"--window-size={width},{height}", "--force-device-scale-factor=1"]
            options = {"binary": next(filter(None, map(shutil.which, BROWSERS))), "args": arguments}
            always = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            self.address += "/" + self._post("", {"capabilities": {"alwaysMatch": always}})["sessionId"]
        except BaseException:
            self.driver.kill()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._send("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()
            self.driver.stdout.close()

    def open(self, file: Path) -> None:
        """Load a file from disk, to its end."""
        self._post("/url", {"url": file.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of ``return ...`` in a script; ``arguments[i]`` are the arguments."""
        return self._post("/execute/sync", {"script": script, "args": arguments})

    def wait_for(self, script: str, seconds: float = 10) -> Any:
        """Run the script until its value is true, and return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} s in vain for {script}")
            time.sleep(0.03)
        return value

    def click(self, selector: str) -> None:
        """Click the middle of the first element, as a mouse would: it fails where something else covers it."""
        self._post(f"/element/{self._find(selector)}/click", {})

    def type(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is: characters, or names of `KEYS`."""
        presses = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def wheel(self, selector: str, down: int) -> None:
        """Turn the wheel over the middle of the first element."""
        origin = {ELEMENT: self._find(selector)}
        scroll = {"type": "scroll", "x": 0, "y": 0, "deltaX": 0, "deltaY": down, "origin": origin}
        self._post("/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [scroll]}]})

    def drag(self, selector: str, right: int, down: int) -> None:
        """Press the mouse in the middle of the first element, move it, let go."""
        origin = {ELEMENT: self._find(selector)}
        actions = [
            {"type": "pointerMove", "x": 0, "y": 0, "origin": origin},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "x": right, "y": down, "origin": "pointer", "duration": 50},
            {"type": "pointerUp", "button": 0},
        ]
        self._post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def errors(self) -> list[str]:
        """Messages of the console since the last call, warnings included."""
        entries = self._post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def _find(self, selector: str) -> str:
        return self._post("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        return self._send("POST", path, json.dumps(content).encode())

    def _send(self, method: str, path: str, content: bytes | None = None) -> Any:
        request = urllib.request.Request(
            self.address + path, content, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None
