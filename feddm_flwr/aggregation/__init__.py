"""The server's arithmetic on the nodes' updates. numpy only."""
