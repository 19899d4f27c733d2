"""What several defenses are made of; a piece is here once two methods use it as it stands."""
