#!/usr/bin/env bash
# Installs the package and trains an encoder; shows a learning curve and slot maps. Five minutes after the install.
# Usage: scripts/demo.sh [--data.path DIR]      for more options: .venv/bin/dino-sparo demo --help
here=$(cd "$(dirname "$0")" && pwd)
calling_folder=$PWD
source "$here/setup.sh" ""
cd "$calling_folder"
exec "$here/../.venv/bin/dino-sparo" demo "$@"
