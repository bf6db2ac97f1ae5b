"""What the commands of ``raysp`` do; ``raysp.cli`` declares their options and imports each when it is used."""
