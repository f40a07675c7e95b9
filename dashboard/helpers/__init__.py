"""What the dashboard's pages share. Each module holds one task; none imports torch before a picture is drawn."""
