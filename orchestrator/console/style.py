"""How the console looks: one style sheet for light and dark, wide and narrow, and the script that writes times.

Times are sent as instants and written by the browser, in its zone. A table on a narrow screen becomes a list of cards,
each cell beside its title, so that nothing is wider than the screen.
"""

from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
CSS: Final = (_HERE / "console.css").read_text(encoding="utf-8")
SCRIPT: Final = f"<script>{(_HERE / 'times.js').read_text(encoding='utf-8')}</script>"
