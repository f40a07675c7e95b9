"""Hold the code that the dashboard's pages share, one task per module. No module imports torch before a picture is drawn."""
