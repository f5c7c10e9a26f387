"""The ServerApp of the fedpeft that is installed here."""

import sys

from fedpeft.config import app_folder

sys.path.insert(0, str(app_folder()))

import server.app

app = server.app.app
