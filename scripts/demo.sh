#!/usr/bin/env bash
# From nothing to a trained encoder, a learning curve and slot maps, in five minutes after the install.
# Usage: scripts/demo.sh [--data.path DIR]      more options: .venv/bin/dino-sparo demo --help
here=$(cd "$(dirname "$0")" && pwd)
calling_folder=$PWD
source "$here/setup.sh" ""
cd "$calling_folder"
exec "$here/../.venv/bin/dino-sparo" demo "$@"
