"""Tap a Flower app that exists already, in one line at the end of its ``server_app.py``.

``from leakbed.tap import tapped`` and ``app = tapped(app)``: that is all.
"""

from leakbed.tap.facts import about
from leakbed.tap.server_app import tapped
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.wiretap import Wiretap

__all__ = ["Recorder", "Trace", "Wiretap", "about", "tapped"]
