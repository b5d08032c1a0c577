"""Worlds of real processes that run many plans, one after another."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from loomtune import api, metrics
from loomtune.launchers_environment import clean  # type: ignore[import-not-found]

PATIENCE = 240.0
"""Seconds for one run, on a busy machine; what is not done by then hangs."""
