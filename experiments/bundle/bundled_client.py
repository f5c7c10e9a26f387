"""The ClientApp of the fedpeft that is installed here: a site runs its own code, not what a server sends."""

import sys

from fedpeft.config import app_folder

sys.path.insert(0, str(app_folder()))

import clients.app

app = clients.app.app
