"""From spec to tuned kernel: spec -> tile space -> rendered source -> built artifact -> trial -> record -> choices."""
