"""The page on which one signs in: plain HTML, so that nothing else has to be let through before."""

import hmac
import secrets
from html import escape
from typing import Final

from starlette.responses import HTMLResponse

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in - vmherd</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; --ground: #f4f6f8; --card: #fff; --ink: #17202a; --line: #8795a1;
  --accent: #1b5fa8 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #12171c; --card: #1d242b; --ink: #e8edf2; --line: #6d7a86; --accent: #7fb6f0 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 16px;
  background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }}
form {{ width: 100%; max-width: 420px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 24px }}
h1 {{ font-size: 24px; margin: 0 0 16px }}
label {{ display: block; font-weight: 600; margin-bottom: 4px }}
input {{ width: 100%; font: inherit; padding: 10px; border: 1px solid var(--line); border-radius: 4px;
  background: var(--ground); color: var(--ink) }}
button {{ margin-top: 16px; width: 100%; font: inherit; font-weight: 600; padding: 10px; border: 0; border-radius: 4px;
  background: var(--accent); color: var(--card); cursor: pointer }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 2px }}
p {{ margin: 16px 0 0 }} .why {{ font-weight: 600 }}
</style></head><body><main><form method="post" action="{action}">
<h1>vmherd</h1>
<input type="hidden" name="form" value="{form}">
<label for="token">API token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Sign in</button>
<p class="why" role="alert">{message}</p>
<p>Made by <code>vmherd token create</code> on a machine of the control plane.</p>
</form></main></body></html>
"""


def new_form_token() -> str:
    """Make what ties a form to the browser that it was shown in."""
    return secrets.token_urlsafe(32)


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same, and not empty; takes as long for a wrong one as for the right one."""
    return bool(one) and hmac.compare_digest(one.encode(), other.encode())


def login_page(action: str, form: str, message: str, code: int) -> HTMLResponse:
    """Make the page.

    Args:
        action: Where its form goes.
        form: As `new_form_token` made it.
        message: What went wrong; empty: nothing.
        code: Of the answer.
    """
    return HTMLResponse(_PAGE.format(action=escape(action), form=escape(form), message=escape(message)), code)
