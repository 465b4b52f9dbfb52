"""Run the broker: `python -I -S app/kafka_broker --directory D --port P [--host H] [--partitions 4]`. Stops on SIGTERM."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # isolated mode (-I) leaves the project out of the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from app.kafka_broker.server import main

    main()
